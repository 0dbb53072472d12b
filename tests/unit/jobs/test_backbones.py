"""Runs and exports of every family of students are opened again; so is one that had a mask."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpal import checkpoint
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.engine import EngineState
from dpal.model.student import Student, build_student
from dpal.pixels import normalise
from jobs import build_shards, export
from jobs.backbones import candidates_of, open_model

from tiny import tiny_values


def _recipe(folder: Path, **student: object) -> Recipe:
    """A run with shards, whose student is `student` at 128 x 64."""
    values = tiny_values(folder)
    recipe = resolve_recipe({**values, "student": {"height": 128, "width": 64, **student}})
    build_shards.run(recipe)
    layout = RunLayout(recipe.run_dir)
    layout.recipe.write_text(recipe.to_yaml())
    return recipe


def _commit(recipe: Recipe, masked: bool = False) -> Student:
    """A student that has seen one batch, committed as training would."""
    student = build_student(recipe.student, seed=3, masked=masked).train()
    with torch.no_grad():
        student(torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(0)))
    parameters = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    parameters["decoder.output_norm.weight"] = torch.ones(32)
    state = EngineState(2, parameters, {}, {})
    checkpoint.commit(RunLayout(recipe.run_dir).checkpoints, state, recipe.science(), keep=2)
    return student.eval()


def _views() -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize("name", ["vit_tiny", "efficientvit_b0"])
def test_run_and_export_give_the_features_of_the_student(tmp_path: Path, name: str):
    recipe = _recipe(tmp_path, name=name)
    student = _commit(recipe)
    with torch.no_grad():
        expected = student(normalise(_views()))
    export.run(recipe)
    layout = RunLayout(recipe.run_dir)
    for folder in (recipe.run_dir, layout.export):
        backbone = open_model(folder).open()
        assert backbone.width == student.embed_dim
        found = backbone(_views())
        torch.testing.assert_close(found.cls.cpu(), expected.cls, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.patches.cpu(), expected.patches, atol=1e-5, rtol=1e-4)
    card = (layout.export / "README.md").read_text()
    assert f"A {recipe.student.title} backbone" in card
    assert ("another number of attention heads" in card) == (name == "vit_tiny")
    assert ("import features, load" in card) == (name != "vit_tiny")


def test_untrained_student_of_a_run_is_that_of_its_seed(tmp_path: Path):
    recipe = _recipe(tmp_path, name="efficientvit_b0")
    _commit(recipe)
    untrained = candidates_of(recipe)[-1]
    with torch.no_grad():
        expected = build_student(recipe.student, recipe.seed).eval()(normalise(_views()))
    assert torch.equal(untrained.open()(_views()).cls.cpu(), expected.cls)


def test_mask_token_of_a_checkpoint_is_left_behind(tmp_path: Path):
    recipe = _recipe(tmp_path, name="vit_tiny")
    student = _commit(recipe, masked=True)
    with torch.no_grad():
        expected = student(normalise(_views()))
    found = open_model(recipe.run_dir).open()(_views())
    torch.testing.assert_close(found.cls.cpu(), expected.cls, atol=1e-5, rtol=1e-4)
    assert not export.run(recipe).skipped


def test_weights_of_another_student_are_refused(tmp_path: Path):
    recipe = _recipe(tmp_path, name="efficientvit_b0")
    _commit(recipe)
    size = {"height": 128, "width": 64}
    other = resolve_recipe({**tiny_values(tmp_path), "student": {"name": "resnet18", **size}})
    with pytest.raises(DataError, match="does not hold the weights of this student"):
        candidates_of(other)[0].open()
