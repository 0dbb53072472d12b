"""Training under kill -9 and SIGTERM: nothing is lost beyond one interval, nothing is repeated."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpal import checkpoint
from dpal.base.errors import EXIT_RUN_AGAIN
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe

from tiny import fill_cache, tiny_recipe, write_recipe

PATIENCE_S = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("killed")
    recipe = tiny_recipe(folder, duration="12 steps", checkpoint_every=3)
    fill_cache(recipe)
    return recipe, folder


def named(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"name": name})


def start(recipe: Recipe, folder: Path) -> subprocess.Popen:
    path = write_recipe(recipe, folder / f"{recipe.name}.yaml")
    log = (folder / f"{recipe.name}.log").open("a")
    command = [sys.executable, "-m", "jobs", "train", str(path)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def events(recipe: Recipe) -> list[dict]:
    path = RunLayout(recipe.run_dir).events
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(recipe: Recipe, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if any(row["event"] == "step" and row["step"] >= step for row in events(recipe)):
            return
        assert process.poll() is None, f"training ended before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def losses(recipe: Recipe) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in events(recipe) if row["event"] == "step"}


def test_killed_and_resumed_training_repeats_the_losses_of_an_undisturbed_run(
    world: tuple[Recipe, Path],
) -> None:
    recipe, folder = world
    whole = named(recipe, "whole")
    assert start(whole, folder).wait(PATIENCE_S) == 0

    killed = named(recipe, "killed")
    process = start(killed, folder)
    wait_for_step(killed, 5, process)
    process.kill()
    process.wait()
    found = checkpoint.latest(RunLayout(killed.run_dir).checkpoints)
    assert found is not None
    assert found.step >= 3, "at most one interval of three steps may be lost"
    assert start(killed, folder).wait(PATIENCE_S) == 0

    expected, actual = losses(whole), losses(killed)
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-6), step
    digests = {
        checkpoint.latest(RunLayout(run.run_dir).checkpoints).files["student.safetensors"]
        for run in (whole, killed)
    }
    assert len(digests) == 1, "the resumed run ends with the same student, bit for bit"


def test_sigterm_commits_exits_75_and_the_next_start_ends_the_run(
    world: tuple[Recipe, Path],
) -> None:
    recipe, folder = world
    stopped = named(recipe, "stopped")
    process = start(stopped, folder)
    wait_for_step(stopped, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == EXIT_RUN_AGAIN
    last = max(losses(stopped))
    found = checkpoint.latest(RunLayout(stopped.run_dir).checkpoints)
    assert found is not None
    assert found.step == last, "nothing is lost when the process is asked to stop"

    assert start(stopped, folder).wait(PATIENCE_S) == 0
    steps = [row["step"] for row in events(stopped) if row["event"] == "step"]
    assert steps == list(range(1, 13)), "no step is repeated"

    assert start(stopped, folder).wait(PATIENCE_S) == 0
    assert "were done before" in (folder / "stopped.log").read_text()
