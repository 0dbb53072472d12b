"""Tiny recipes whose composites are of two images, or of drawn scenes with boxes."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.synthetic import draw_background, draw_person
from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from jobs import build_shards

from tiny import tiny_values

HEIGHT, WIDTH = 150, 260  # of a scene
NUM_SCENES = 6
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "two": {"views": {"composite": "two"}},
    "instances": {
        "views": {"composite": "scenes"},
        "data": {"scenes": None},
        "loss": {"relation_level": "instances"},
    },
    "pinned": {"views": {"photometric": "pinned"}},
}


def write_scenes(folder: Path, count: int = NUM_SCENES) -> Path:
    """Scenes with as many persons as 1, 2, 3, 1, 2, ..., and their boxes in `boxes.csv`."""
    folder.mkdir(parents=True)
    rows = ["file,left,top,right,bottom"]
    for index in range(count):
        scene = np.array(draw_background(1, index, (HEIGHT, WIDTH)))
        for place in range(1 + index % 3):
            picture = Image.fromarray(draw_person(1, place, index).image).resize((60, 120))
            left, top = 15 + 80 * place, 10 + 5 * index % 20
            scene[top : top + 120, left : left + 60] = np.asarray(picture)
            rows.append(f"{index}.jpg,{left},{top},{left + 60},{top + 120}")
        Image.fromarray(scene).save(folder / f"{index}.jpg", quality=90)
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    return folder


def arm_recipe(folder: Path, arm: str, **sections: dict[str, Any]) -> Recipe:
    """The tiny recipe with one of `ARMS`, sharded; `sections` override what it says."""
    values = tiny_values(folder)
    for changes in (ARMS[arm], sections):
        for name, section in changes.items():
            values[name] = {**values.get(name, {}), **section}
    if "scenes" in values["data"]:
        scenes = folder / "scenes"
        values["data"]["scenes"] = [str(scenes if scenes.exists() else write_scenes(scenes))]
    recipe = resolve_recipe(values)
    build_shards.run(recipe)
    return recipe
