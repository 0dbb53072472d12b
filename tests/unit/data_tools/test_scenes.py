"""Scenes: boxes in both formats reach the shards, the pool and the composites."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.audit import audit_shards
from data_tools.backgrounds import load_backgrounds
from data_tools.composites import Composer
from data_tools.manifest import load_manifest
from data_tools.scenes import load_scenes, scenes_url
from data_tools.shard import read_shard
from data_tools.storage import open_store
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe
from dpal.views.plan import ViewPlan
from dpal.views.specs import Box, SceneSpec, ViewSpec
from jobs import build_shards

SIZE = (60, 90)


def write_images(folder: Path, names: list[str]) -> Path:
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return folder


def recipe_of(folder: Path, **sections: dict[str, Any]) -> Recipe:
    """A recipe of the scenes in `folder/scenes`."""
    if not (folder / "persons").exists():
        write_images(folder / "persons", [f"p{index}.jpg" for index in range(4)])
    values: dict[str, Any] = {
        "name": "scenes",
        "output": str(folder / "runs"),
        "data": {
            "images": [str(folder / "persons")],
            "scenes": [str(folder / "scenes")],
            "samples_per_shard": 2,
        },
        "views": {"composite": "scenes"},
        "teacher": {"kind": "timm", "name": "vit_tiny_patch16_224", "weights": "w"},
        "train": {"global_batch": 256},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return resolve_recipe(values)


def stored(recipe: Recipe) -> dict[str, list[list[float]]]:
    """Boxes in the shards, by source name."""
    store = open_store(scenes_url(recipe.data.shards), recipe.storage)
    metas = []
    for ref in load_manifest(store).shards:
        shard = read_shard(store, ref, None)
        metas += [shard.meta(row) for row in range(len(shard))]
    return {meta["source"]: meta["boxes"] for meta in metas}


def csv(*rows: str) -> str:
    return "\n".join(["file,left,top,right,bottom", *rows]) + "\n"


def test_boxes_of_a_csv_are_cut_at_the_image_and_follow_it_into_the_shard(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "scenes", ["a.jpg", "sub/b.jpg", "c.jpg"])
    rows = ["a.jpg,10,20,30,50", "a.jpg,-5,0,12.5,99", "sub/b.jpg,0,0,90,60", "a.jpg,95,0,99,9"]
    (folder / "boxes.csv").write_text(csv(*rows))
    recipe = recipe_of(tmp_path)
    result = build_shards.run(recipe)
    assert "3 scenes in 2 shards with 3 persons" in result.detail
    assert "rejected" not in result.detail
    assert stored(recipe) == {
        "a.jpg": [[10, 20, 30, 50], [0, 0, 12.5, 60]],
        "sub/b.jpg": [[0, 0, 90, 60]],
        "c.jpg": [],
    }
    assert build_shards.run(recipe).skipped
    assert audit_shards(open_store(recipe.data.shards, recipe.storage)) == []


def coco(**changes: Any) -> str:
    values = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [10, 20, 20, 30], "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [1, 1, 5, 5], "iscrowd": 0},
            {"image_id": 9, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1},
            {"image_id": 9, "category_id": 1, "bbox": [2.5, 3, 4, 5]},
        ],
    }
    return json.dumps(values | changes)


def test_persons_of_a_coco_file_are_found_by_their_files_own_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "scenes", ["val/a.jpg", "val/b.jpg"])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_val.json").write_text(coco())
    recipe = recipe_of(tmp_path)
    build_shards.run(recipe)
    assert stored(recipe) == {"val/a.jpg": [[10, 20, 30, 50]], "val/b.jpg": [[2.5, 3, 6.5, 8]]}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"boxes.csv": "file,x\n"}, r"boxes\.csv.*accepted are file,left,top,right,bottom"),
        ({"boxes.csv": csv("a.jpg,1,2,x,4")}, r"boxes\.csv:2.*not four numbers"),
        ({"boxes.csv": csv("a.jpg,1,2,3")}, r"boxes\.csv:2.*not four numbers"),
        ({"boxes.csv": csv("a.jpg,1,2,inf,4")}, r"boxes\.csv:2.*not finite"),
        ({"boxes.csv": csv("z.jpg,1,2,3,4")}, "names none of the images.*'z.jpg'"),
        ({"i.json": "{"}, r"i\.json.*no COCO instances file"),
        ({"i.json": coco(images=[])}, r"i\.json.*no COCO instances file"),
        ({"i.json": coco(), "boxes.csv": csv()}, "several files of boxes"),
    ],
    ids=str,
)
def test_boxes_that_cannot_be_understood_are_refused_by_name(
    tmp_path: Path, files: dict[str, str], sentence: str
) -> None:
    folder = write_images(tmp_path / "scenes", ["a.jpg", "b.jpg"])
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        build_shards.run(recipe_of(tmp_path))


def test_new_boxes_are_stored_anew_and_leave_the_pool_its_digest(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "scenes", ["a.jpg", "b.jpg"])
    recipe = recipe_of(tmp_path)
    build_shards.run(recipe)
    before = load_scenes(recipe)
    assert [len(boxes) for boxes in before.boxes] == [0, 0]
    (folder / "boxes.csv").write_text(csv("a.jpg,1,2,30,40", "a.jpg,5,6,7,8"))
    assert not build_shards.run(recipe).skipped
    after = load_scenes(recipe)
    assert sorted(len(boxes) for boxes in after.boxes) == [0, 2]
    assert after.digest == before.digest
    write_images(folder, ["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(DataError, match="already holds shards of other images"):
        build_shards.run(recipe)


def test_the_pool_is_the_first_scenes_and_its_digest_is_of_them(tmp_path: Path) -> None:
    write_images(tmp_path / "scenes", ["a.jpg", "b.jpg", "c.jpg"])
    recipe = recipe_of(tmp_path)
    build_shards.run(recipe)
    whole, first = load_scenes(recipe), load_scenes(recipe_of(tmp_path, data={"max_scenes": 1}))
    assert (len(whole.sizes), len(first.sizes)) == (3, 1)
    assert np.array_equal(whole.image(0), first.image(0))
    assert whole.image(2).shape == (*SIZE, 3)
    assert whole.digest != first.digest


def test_instances_need_a_scene_with_two_persons(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "scenes", ["a.jpg", "b.jpg"])
    (folder / "boxes.csv").write_text(csv("a.jpg,1,2,30,40", "b.jpg,5,6,7,8"))
    recipe = recipe_of(tmp_path, loss={"relation_level": "instances"})
    build_shards.run(recipe)
    with pytest.raises(DataError, match=r"no scene in .* has boxes of two persons"):
        load_backgrounds(recipe)


def test_a_composite_shows_the_scene_that_its_spec_names(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "scenes", ["a.jpg", "b.jpg"])
    (folder / "boxes.csv").write_text(csv("a.jpg,30,0,60,60", "b.jpg,30,0,60,60"))
    recipe = recipe_of(tmp_path)
    build_shards.run(recipe)
    pool = load_backgrounds(recipe)
    composer = Composer(ViewPlan(0, recipe.views), pool)
    spec = SceneSpec(1, ViewSpec(Box(0, 30, 60, 60), True))
    drawn = composer.draw("k", 0, np.zeros((8, 8, 3), np.uint8), None, spec)
    whole = Image.fromarray(pool.scenes.image(1))
    expected = whole.resize((256, 256), Image.Resampling.BICUBIC, box=(30, 0, 90, 60))
    assert np.array_equal(drawn.pixels, np.asarray(expected)[:, ::-1])
    assert composer.boxes(spec).tolist() == [[128, 0, 256, 256]]
    asked = composer.draw("k", 0, np.zeros((8, 8, 3), np.uint8), None)
    again = composer.draw("k", 0, np.ones((9, 9, 3), np.uint8), None)
    assert asked.spec == again.spec
    assert np.array_equal(asked.pixels, again.pixels)
