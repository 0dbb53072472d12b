"""`dpal parity --against fp32`: a teacher in bf16, or in another runtime, beside its exact self."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpal.base.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, ConfigError
from dpal.base.recipe import Recipe
from dpal.model.teacher import Teacher
from dpal.model.timm_import import timm
from jobs.__main__ import main
from jobs.caching.plan import teacher_of
from jobs.codec_sample import draw_sample
from jobs.parity_precision import PrecisionParity, inexact, measure, run_against_fp32

from tiny import tiny_recipe, write_recipe


def with_teacher(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=changes)})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return with_teacher(tiny_recipe(tmp_path_factory.mktemp("precision")), precision="bf16")


@pytest.fixture(scope="module")
def found(recipe: Recipe) -> PrecisionParity:
    return measure("teacher", recipe, 8, 0)


def test_bf16_is_near_fp32_but_not_equal(found: PrecisionParity) -> None:
    assert found.passed
    assert found.setting == "precision=bf16"
    assert found.tokens == found.samples * (1 + 32 + 1 + 64)
    assert 0.999 < found.median_cosine < 1 - 1e-6
    assert found.smallest_cosine < found.median_cosine
    assert 0 < found.largest_excess < 1
    assert set(found.losses) == {"loss", "identity", "shape", "relation"}
    assert all(ours == pytest.approx(exact, rel=0.1) for ours, exact in found.losses.values())
    assert any(ours != exact for ours, exact in found.losses.values())


def test_the_squared_error_is_that_of_two_teachers_on_the_same_pixels(
    recipe: Recipe, found: PrecisionParity
) -> None:
    sample = draw_sample(with_teacher(recipe, precision="fp32"), 8)
    tokens = []
    for precision in ("fp32", "bf16"):
        teacher = teacher_of(with_teacher(recipe, precision=precision))
        rows = [teacher(torch.as_tensor(batch.base)).patches for batch in sample.batches]
        tokens.append(torch.cat(rows).double().numpy().reshape(-1, teacher.width))
    exact, other = tokens
    wanted = np.square(other - exact).sum() / np.square(exact - exact.mean(0)).sum()
    assert found.nmse == pytest.approx(wanted, rel=1e-3)
    assert 1e-7 < wanted < 1e-3


def test_another_seed_looks_at_other_images(recipe: Recipe, found: PrecisionParity) -> None:
    assert measure("teacher", recipe, 8, 1).nmse != found.nmse


def test_a_teacher_whose_bf16_is_another_one_fails_with_exit_3(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Positions far from zero: bf16 rounds away what patches add to them."""
    weights = tmp_path / "far.safetensors"
    state = load_file(recipe.teacher.weights)
    save_file({**state, "pos_embed": state["pos_embed"] + 30}, weights)
    path = write_recipe(with_teacher(recipe, weights=str(weights)), tmp_path / "r.yaml")
    out = tmp_path / "out.json"
    words = ["parity", str(path), "-n", "8", "--against", "fp32", "--json", str(out)]
    assert main(words) == EXIT_DATA
    said = json.loads(out.read_text())
    assert not said["teachers"][0]["passed"]
    captured = capsys.readouterr()
    assert "teacher with precision=bf16 against fp32: fails" in captured.out
    assert said["failures"][0] in captured.err
    assert "is not what it is in fp32: median cosine" in captured.err


def test_a_forward_that_is_disturbed_is_seen(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the second teacher is disturbed, by a share of a token that bf16 would not reach."""
    plain = Teacher.__call__

    def shaken(self: Teacher, pixels: torch.Tensor):
        tokens = plain(self, pixels)
        if self.identity["precision"] == "fp32":
            return tokens
        noise = torch.randn(tokens.patches.shape, generator=torch.Generator().manual_seed(0))
        return tokens._replace(patches=tokens.patches + 0.3 * tokens.patches.std() * noise)

    monkeypatch.setattr(Teacher, "__call__", shaken)
    assert not measure("teacher", recipe, 8, 0).passed


def test_the_command_says_what_it_found(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_recipe(recipe, tmp_path / "r.yaml"), tmp_path / "out.json"
    words = ["parity", str(path), "-n", "4", "--against", "fp32"]
    assert main([*words, "--json", str(out)]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "teacher with precision=bf16 against fp32: passes: 16 samples" in said
    assert "  relation: " in said
    assert json.loads(out.read_text())["teachers"][0]["passed"]
    assert main([*words, "teacher.precision=fp32"]) == EXIT_CONFIG
    assert "no teacher of the recipe runs in another way" in capsys.readouterr().err


def test_onnx_runtime_is_held_to_the_bounds_of_fp32(recipe: Recipe, tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    changes = {"name": "test_resnet", "weights": str(weights), "precision": "fp32"}
    other = with_teacher(recipe, runtime="onnxruntime", **changes)
    assert inexact(other.teacher) == {"runtime": "onnxruntime"}
    found = measure("teacher", other, 8, 0)
    assert found.passed
    assert found.setting == "runtime=onnxruntime"
    assert found.accepted.median > 0.9994
    assert found.nmse < 1e-8


def test_fewer_than_one_sample_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="-n 0: accepted is 1 and more"):
        run_against_fp32(recipe, 0)
