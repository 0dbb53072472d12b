"""Real training on a real two-node Slurm: stopped, requeued by itself, resumed, the same run."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.launcher import JobStatus
from dpal import checkpoint
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs import submit as verbs

from command import call
from tiny import fill_cache, tiny_recipe, write_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
STEPS, PATIENCE_S = 16, 300
# One rank on each of two nodes; no checkpoint is due before the end, so only a stop commits one.
TWO_NODES = (
    "train.micro_batch=4",
    "job.nodes=2",
    "job.cpus_per_node=1",
    "job.memory_gb=2",
    "job.time_minutes=20",
)


def wait_for(condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited too long\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.1)


def events(recipe: Recipe, event: str) -> list[dict]:
    path = RunLayout(recipe.run_dir).events
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [row for row in rows if row["event"] == event]


def losses(recipe: Recipe) -> list[float]:
    return [row["loss"] for row in events(recipe, "step")]


def test_training_on_two_nodes_survives_a_requeue_as_if_nothing_had_happened(
    on_slurm: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path, duration=f"{STEPS} steps", checkpoint_every=1000)
    fill_cache(recipe)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")

    told = call(capsys, "submit", path, "--stage", "train", "--on", "slurm", *TWO_NODES)
    (job,) = re.findall(r"^submitted (slurm:\d+)$", told.printed, re.MULTILINE)
    number = job.partition(":")[2]
    log = recipe.run_dir / "jobs" / "tiny-train" / f"slurm-{number}.log"
    wait_for(lambda: len(events(recipe, "step")) >= 3, log)
    # What --signal=B:USR1@… does before the time limit: USR1 to the batch shell alone.
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)
    wait_for(lambda: verbs.status(job).state not in ("pending", "running"), log)
    assert verbs.status(job) == JobStatus("succeeded", "COMPLETED, 1 restarts, exit code 0")

    (stop,) = events(recipe, "stop")
    assert 3 <= stop["step"] < STEPS
    starts = [(row["step"], row["world_size"]) for row in events(recipe, "start")]
    assert starts == [(0, 2), (stop["step"], 2)]
    assert [row["step"] for row in events(recipe, "step")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in events(recipe, "checkpoint")] == [stop["step"], STEPS]
    found = checkpoint.latest(RunLayout(recipe.run_dir).checkpoints)
    assert found is not None
    assert found.step == STEPS
    printed = "\n".join(verbs.logs(job))
    assert "stopped with a committed checkpoint" in printed
    assert f"job {number}: exit code 75 after 0 restarts" in printed
    assert f"job {number}: exit code 0 after 1 restarts" in printed

    alone = recipe.model_copy(update={"name": "alone"})
    command = [sys.executable, "-m", "jobs", "train"]
    subprocess.run([*command, write_recipe(alone, tmp_path / "alone.yaml")], check=True)
    assert losses(recipe) == pytest.approx(losses(alone), rel=2e-4)
