"""One and two processes with the same global batch are the same run, at every ZeRO stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpal import checkpoint
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe

from tiny import fill_cache, tiny_recipe, write_recipe

STEPS = 20


def losses(recipe: Recipe) -> dict[int, float]:
    rows = map(json.loads, RunLayout(recipe.run_dir).events.read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def train(recipe: Recipe, name: str, folder: Path, **changes: object) -> Recipe:
    """Run `dpal train` in a folder of its own on the shared shards and targets."""
    changed = recipe.train.model_copy(update=changes)
    run = recipe.model_copy(update={"name": name, "train": changed})
    path = write_recipe(run, folder / f"{name}.yaml")
    command = [sys.executable, "-m", "jobs", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("distributed")
    recipe = tiny_recipe(folder, duration=f"{STEPS} steps", checkpoint_every=100)
    fill_cache(recipe)
    return recipe, folder


def test_two_processes_and_one_give_the_same_losses_for_20_steps(
    world: tuple[Recipe, Path],
) -> None:
    recipe, folder = world
    alone = losses(train(recipe, "alone", folder, zero_stage=0))
    pair = losses(train(recipe, "pair", folder, zero_stage=1, processes=2, micro_batch=4))
    accumulated = losses(train(recipe, "accumulated", folder, zero_stage=2, micro_batch=2))
    assert sorted(alone) == list(range(1, STEPS + 1))
    for step, loss in alone.items():
        assert pair[step] == pytest.approx(loss, rel=2e-4), step
        assert accumulated[step] == pytest.approx(loss, rel=2e-4), step
    assert alone[STEPS] < alone[1]


def test_a_run_goes_on_at_another_world_size_and_zero_stage(world: tuple[Recipe, Path]) -> None:
    """2 ranks of ZeRO 3 stop half-way; 1 rank of ZeRO 1 ends the run on the same losses."""
    recipe, folder = world
    steps = 8
    undisturbed = losses(train(recipe, "whole", folder, duration=f"{steps} steps", zero_stage=0))

    first = train(recipe, "moved", folder, duration=f"{steps} steps", zero_stage=3, processes=2,
                  micro_batch=4, checkpoint_every=4)  # fmt: skip
    checkpoints = RunLayout(first.run_dir).checkpoints
    (checkpoints / f"step-{steps:08d}" / "COMMITTED").unlink()  # as if it had died after step 4
    assert checkpoint.latest(checkpoints).step == 4
    second = train(recipe, "moved", folder, duration=f"{steps} steps", zero_stage=1)
    moved = losses(second)
    for step, loss in undisturbed.items():
        assert moved[step] == pytest.approx(loss, rel=2e-4), step
    events = RunLayout(second.run_dir).events.read_text().splitlines()
    starts = [row for row in map(json.loads, events) if row["event"] == "start"]
    assert [(row["step"], row["world_size"]) for row in starts] == [(0, 2), (4, 1)]
