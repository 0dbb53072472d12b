"""Every method goes on after a kill with the same student, and is the same run at ZeRO 0 and 1."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpal import checkpoint
from dpal.base.config import resolve_recipe
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs import build_shards, train

from tiny import fill_cache, tiny_values

STEPS = 4
SAIP = {"kind": "saip", "local_crops": 2, "prototypes": 64, "hidden": 64, "bottleneck": 32}
SAIP |= {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 4}
METHODS: dict[str, dict[str, Any]] = {
    "dpal": {"decoder": {"routing": "top-1", "query_init": "normal"}},
    "mse": {"loss": {"targets": "standardised"}},
    "proteus": {"student": {"drop_path": 0.2}, "ema": 0.9},
    "tinymim": {"student": {"last_heads": 3, "position_embedding": "sincos", "drop_path": 0.1}},
    "saip": {"method": SAIP},
}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One world for all methods: shards, and a cache of the output of block 9."""
    folder = tmp_path_factory.mktemp("methods")
    values = tiny_values(folder, duration=f"{STEPS} steps", checkpoint_every=2)
    values["teacher"] |= {"tap": "block9"}
    values["data"] |= {"shards": str(folder / "shards")}
    values["cache"] |= {"url": str(folder / "targets")}
    recipe = resolve_recipe(values)
    build_shards.run(recipe)
    fill_cache(recipe)
    return values


def recipe_of(values: dict[str, Any], method: str, name: str, zero_stage: int) -> Recipe:
    changes = dict(METHODS[method])
    student = {**values["student"], **changes.pop("student", {})}
    spec = {**values["train"], "zero_stage": zero_stage, "ema": changes.pop("ema", 0.0)}
    own = {"name": f"{method}-{name}", "method": method, "student": student, "train": spec}
    return resolve_recipe({**values, **own, **changes})


def run(recipe: Recipe) -> None:
    """Train in a process of its own, as DeepSpeed cannot be started twice in one.

    A fork server imports once for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.train", "dpal.model.timm_import"])
    process = context.Process(target=train.run, args=(recipe,))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def losses(recipe: Recipe) -> dict[int, float]:
    rows = map(json.loads, RunLayout(recipe.run_dir).events.read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def files(folder: Path) -> dict[str, str]:
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.step == STEPS
    return dict(found.files)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_on_after_a_kill_and_at_another_zero_stage(
    values: dict[str, Any], method: str
) -> None:
    whole = recipe_of(values, method, "whole", zero_stage=1)
    run(whole)
    folder = RunLayout(whole.run_dir).checkpoints
    undisturbed, expected = files(folder), losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))

    shutil.rmtree(folder / f"step-{STEPS:08d}")  # as if it had died after step 2
    run(whole)
    assert files(folder) == undisturbed, "every file of the checkpoint, bit for bit"
    assert losses(whole) == pytest.approx(expected, rel=1e-6)

    plain = recipe_of(values, method, "plain", zero_stage=0)
    run(plain)
    assert losses(plain) == pytest.approx(expected, rel=2e-4)

    names = {"student.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}
    assert names <= undisturbed.keys()
    assert ("average.safetensors" in undisturbed) == (method == "proteus")
