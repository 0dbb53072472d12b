"""A run folder with invented events, scores and pictures, for tests of the report."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from dpal.base.config import resolve_recipe
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.visualize import feature_maps, heat_overlay, mosaic
from jobs.previews.index import Preview, PreviewIndex, write_index

PERSONS, GRID, SIZE = 8, (16, 8), (256, 128)


def made_up_recipe(output: Path, steps: int = 300) -> Recipe:
    """A recipe that points into `output`; its storage has a secret that must stay one."""
    return resolve_recipe(
        {
            "name": "made-up",
            "output": str(output),
            "data": {"images": ["synthetic"]},
            "storage": {"key": "KEY-AbC123", "secret": "SECRET-XyZ789"},
            "teacher": {"kind": "taught"},
            "train": {"duration": f"{steps} steps", "global_batch": 64, "micro_batch": 64},
        }
    )


def write_run(recipe: Recipe, steps: int = 300) -> RunLayout:
    """Fill the run folder: a resumed and finished run with scores and pictures."""
    layout = RunLayout(recipe.run_dir)
    layout.previews.mkdir(parents=True)
    rows = [_start(1000.0), *(_step(n, steps, 1.0) for n in range(1, steps // 2 + 20))]
    rows += [{"event": "checkpoint", "step": steps // 2, "time": 1100.0, "seconds": 0.21}]
    rows += [_start(1200.0), *(_step(n, steps, 0.5) for n in range(steps // 2 + 1, steps + 1))]
    rows += [{"event": "checkpoint", "step": steps, "time": 1300.0, "seconds": 0.24}]
    rows += [{"event": "done", "step": steps, "time": 1301.0}]
    layout.events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout.evaluation.write_text(json.dumps(_scores()))
    write_pictures(layout.previews)
    return layout


def write_pictures(folder: Path) -> None:
    """Invented photographs, masks and feature maps, with their index."""
    rng = np.random.default_rng(0)
    photos = [_texture(rng) for _ in range(PERSONS)]
    tokens = np.stack([_tokens(photo, rng) for photo in photos])
    maps = feature_maps(tokens, tokens @ rng.normal(size=(3, 24)), grid=GRID, size=SIZE)
    assert maps.student is not None
    masks = [heat_overlay(photo, photo[8::16, 8::16, 0] / 255) for photo in photos]
    pictures = {
        "views": mosaic([photos], row_labels=["source"]),
        "masks": mosaic([photos, masks], row_labels=["view", "mask"]),
        "features": mosaic(
            [photos, list(maps.teacher), list(maps.student)],
            row_labels=["view", "teacher", "student"],
        ),
    }
    previews = []
    for kind, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{kind}.png")
        title, caption = f"Invented {kind}", "Smooth random textures <not photographs>."
        previews.append(Preview(folder / f"{kind}.png", kind, title, caption))
    write_index(folder, PreviewIndex("0" * 16, tuple(previews)))


def _start(time: float) -> dict[str, object]:
    parameters = {"student": 5_510_016, "decoder": 29_350_000}
    return {
        "event": "start",
        "step": 0,
        "time": time,
        "num_parameters": parameters,
        "world_size": 2,
    }


def _step(number: int, steps: int, data_ms: float) -> dict[str, object]:
    """A row whose values fall as losses do, with some noise that is a function of the step."""
    noise = 1 + 0.08 * math.sin(number * 12.9898) * math.cos(number * 78.233)
    fall = math.exp(-4 * number / steps)
    terms = {
        "identity": 0.4 + 0.6 * fall,
        "shape": 0.3 + 0.5 * fall,
        "relation": 3e-3 + 4 * fall**3,
    }
    terms |= {"router": 0.01 + 1.1 * fall**2, "expert": 0.02 + 0.035 * fall}
    terms = {name: value * noise for name, value in terms.items()}
    right = [1 - 0.66 * fall, 1 - 0.6 * fall, 1 - 0.63 * fall**0.5]
    row = {"event": "step", "step": number, "time": 1000.0 + number, **terms}
    row["loss"] = sum(terms[name] for name in ("identity", "shape", "relation"))
    row["lr"] = 1e-3 * min(1, number / 30) * (0.5 + 0.5 * math.cos(math.pi * number / steps))
    row |= {"data_s": data_ms / 1e3, "step_s": 0.2 * noise, "images_per_s": 64 / (0.2 * noise)}
    table = [[p if i == j else (1 - p) / 2 for j in range(3)] for i, p in enumerate(right)]
    return {**row, "router_probability": right, "routing": table}


def _scores() -> list[dict[str, object]]:
    table = {
        ("reid", "untrained"): {"mAP": 21.3, "rank1": 34.0},
        ("reid", "student"): {"mAP": 63.7, "rank1": 79.2},
        ("reid", "teacher"): {"mAP": 81.0, "rank1": 92.4},
        ("parsing", "untrained"): {"mIoU": 18.2},
        ("parsing", "student"): {"mIoU": 52.9},
        ("parsing", "teacher"): {"mIoU": 60.1},
    }
    return [
        {"task": task, "model": model, "data": "synthetic", "metrics": metrics}
        for (task, model), metrics in table.items()
    ]


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Smooth colours, uint8 [256, 128, 3]."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))


def _tokens(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Colour of every patch plus noise, [128, 3]."""
    patches = photo.reshape(GRID[0], 16, GRID[1], 16, 3).mean((1, 3)).reshape(-1, 3)
    return patches + rng.normal(size=patches.shape)
