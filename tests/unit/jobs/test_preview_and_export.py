"""Pictures and export of a real little run: shards, teacher, and a committed checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpal import checkpoint
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.engine import EngineState
from dpal.export import Parity
from dpal.model.decoder import DynamicPatternDecoder
from dpal.model.student import build_student
from jobs import build_shards, export, preview
from jobs.model_card import model_card
from jobs.previews.index import read_previews

from tiny import fill_cache, tiny_recipe, tiny_values


def _commit(recipe: Recipe, step: int) -> None:
    """A checkpoint with fresh weights that differ from step to step."""
    student = build_student(recipe.student, seed=step)
    decoder = DynamicPatternDecoder(student.embed_dim, 192, recipe.decoder)
    parameters = {
        f"{part}.{name}": tensor
        for part, module in (("student", student), ("decoder", decoder))
        for name, tensor in module.state_dict().items()
    }
    moment = {"student.norm.bias": torch.zeros(192)}
    state = EngineState(step, parameters, moment, moment)
    checkpoint.commit(RunLayout(recipe.run_dir).checkpoints, state, recipe.science(), keep=2)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path)


def _kinds(recipe: Recipe) -> dict[str, str]:
    index = read_previews(RunLayout(recipe.run_dir).previews)
    assert index is not None
    for one in index.previews:
        assert np.asarray(Image.open(one.file)).std() > 5, f"{one.kind} is blank"
    return {one.kind: one.caption for one in index.previews}


def test_pictures_follow_what_the_run_has(recipe: Recipe):
    assert not preview.run(recipe).skipped
    without = _kinds(recipe)
    assert "on these images only" in without["masks"]
    assert "student" not in without["features"]
    fill_cache(recipe)
    assert not preview.run(recipe).skipped
    assert "stored with the target cache" in _kinds(recipe)["masks"]
    _commit(recipe, 4)
    assert not preview.run(recipe).skipped
    assert "Procrustes" in _kinds(recipe)["features"]
    assert preview.run(recipe).skipped
    (RunLayout(recipe.run_dir).previews / "views.png").unlink()
    assert not preview.run(recipe).skipped


@pytest.mark.parametrize(
    ("sections", "kinds"),
    [
        ({"loss": {"relation": 0}}, {"views", "masks", "features"}),
        ({"loss": {"shape": 0}}, {"views", "composites", "features", "similarity"}),
        ({"method": "mse", "views": {"composites": 0}}, {"views", "features"}),
        ({"method": {"kind": "saip", "local_crops": 3}, "teacher": None}, {"views", "composites"}),
        ({"views": {"composite": "two", "photometric": "pinned"}}, None),
    ],
)
def test_a_method_shows_what_it_makes_use_of(
    tmp_path: Path, sections: dict[str, Any], kinds: set[str] | None
):
    values = tiny_values(tmp_path)
    sections = {**sections, "views": {**values["views"], **sections.get("views", {})}}
    recipe = resolve_recipe({**values, **sections})
    build_shards.run(recipe)
    preview.run(recipe)
    shown = _kinds(recipe)
    if kinds is not None:
        assert set(shown) == kinds
    else:
        assert "base view of another" in shown["composites"]
        assert "same colour noise" in shown["views"]


def test_a_student_without_a_teacher_shows_its_own_features(tmp_path: Path):
    method = {"kind": "saip", "local_crops": 3}
    recipe = resolve_recipe({**tiny_values(tmp_path), "method": method, "teacher": None})
    build_shards.run(recipe)
    _commit(recipe, 2)
    preview.run(recipe)
    assert set(_kinds(recipe)) == {"views", "composites", "features"}


def test_export_follows_the_last_checkpoint(recipe: Recipe):
    layout = RunLayout(recipe.run_dir)
    with pytest.raises(DataError, match="no committed checkpoint"):
        export.run(recipe)
    _commit(recipe, 2)
    assert not export.run(recipe).skipped
    assert export.run(recipe).skipped
    assert not export.run(recipe, "onnx").skipped
    assert export.run(recipe, "onnx").skipped
    assert export.run(recipe).skipped
    first = json.loads((layout.export / "parity.json").read_text())
    assert first["step"] == 2
    assert first["max_abs_error"] <= 1e-4
    _commit(recipe, 4)
    assert not export.run(recipe).skipped
    assert json.loads((layout.export / "parity.json").read_text())["step"] == 4
    assert not (layout.export / "model.onnx").exists(), "the graph of an older step must go"


def test_card_says_what_the_model_is_and_withholds_a_licence(recipe: Recipe):
    layout = RunLayout(recipe.run_dir)
    _commit(recipe, 2)
    row = {"task": "reid", "model": "student", "data": "x", "metrics": {"mAP": 41.5, "IoU a": 1}}
    layout.evaluation.write_text(json.dumps([row]))
    export.run(recipe)
    card = (layout.export / "README.md").read_text()
    assert "| reid | mAP | – | 41.5 | – |" in card
    assert "IoU a" not in card
    assert "40, from" in card
    assert "no licence of their own" in card
    assert "derive from the images and the teacher\n" in card
    assert "another number of attention heads" in card
    everyone = (layout.export / "model.safetensors").stat().st_mode & 0o044
    assert everyone == (layout.export / "config.json").stat().st_mode & 0o044


def test_the_card_of_a_student_without_a_teacher_names_none(tmp_path: Path):
    method = {"kind": "saip", "local_crops": 3}
    recipe = resolve_recipe({**tiny_values(tmp_path), "method": method})  # one to compare with
    card = model_card(recipe, 2, (), Parity(0.0, 0.0, 1.0, 1), 1, 1)
    assert "| teacher | none |" in card
    assert "derive from the images\nnamed above" in card


def test_unknown_format_is_refused_in_one_sentence(recipe: Recipe):
    with pytest.raises(ConfigError, match="accepted are timm and onnx"):
        export.run(recipe, "tflite")
