"""A run on half a cache is killed while the other half is finished: it goes on unchanged."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.caching.worker import ShardWorker

from tiny import fill_cache, tiny_recipe, write_recipe

PATIENCE_S = 300


def start(recipe: Recipe, folder: Path) -> subprocess.Popen:
    path = write_recipe(recipe, folder / f"{recipe.name}.yaml")
    log = (folder / f"{recipe.name}.log").open("a")
    command = [sys.executable, "-m", "jobs", "train", str(path)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def losses(recipe: Recipe) -> dict[int, float]:
    path = RunLayout(recipe.run_dir).events
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def test_shards_that_are_finished_after_the_first_start_change_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, partial=True, parity_samples=2)
    worker = ShardWorker(recipe)
    worker.calibrate()
    for ref in worker.manifest.shards[1:3]:
        worker.cache_shard(ref)
    whole, killed = (recipe.model_copy(update={"name": name}) for name in ("whole", "killed"))
    assert start(whole, tmp_path).wait(PATIENCE_S) == 0
    assert "learning from 2 shards, 20 samples" in (tmp_path / "whole.log").read_text()

    process = start(killed, tmp_path)
    deadline = time.monotonic() + PATIENCE_S
    while len(losses(killed)) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert max(losses(killed)) < 6
    fill_cache(recipe)
    assert start(killed, tmp_path).wait(PATIENCE_S) == 0
    assert "compared with the teacher before" in (tmp_path / "killed.log").read_text()

    expected, seen = losses(whole), losses(killed)
    assert seen.keys() == expected.keys()
    for step, loss in expected.items():
        assert seen[step] == pytest.approx(loss, rel=1e-6), step
