"""A real Prometheus scrapes a real training run; the dashboard shows what the run says."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.monitoring.panels import panels
from cluster.ranks import free_port
from dpal.base import telemetry as t
from dpal.base.errors import EXIT_RUN_AGAIN
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.method.dpal import DpalTask
from jobs.dashboards import write_dashboards

from prometheus_test import Prometheus, serve, wait_for
from tiny import fill_cache, tiny_recipe, write_recipe

pytestmark = pytest.mark.slow
PATIENCE_S = 240.0
OF_THE_CACHE = {t.CACHE_IMAGES, t.CACHE_SHARDS, t.CACHE_SHARDS_TOTAL}
PATTERNS = {"identity", "shape", "relation"}
# What tells the series of a panel apart, beside `run`.
SERIES = {
    "Loss by term": {("term", term) for term in DpalTask.terms},
    "Router probability by pattern": {("pattern", pattern) for pattern in PATTERNS},
    "Where the time goes, by phase": {("phase", p) for p in ("data", "step", "checkpoint")},
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Recipe, subprocess.Popen[bytes]]]:
    """Training without an end in sight, with its metrics port open."""
    if shutil.which("prometheus") is None:
        pytest.skip("not installed: prometheus (apt-get install prometheus)")
    recipe = tiny_recipe(
        tmp_path, duration="5000 steps", checkpoint_every=2, metrics_port=free_port()
    )
    fill_cache(recipe)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    with (tmp_path / "train.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "train", str(path)], stdout=log, stderr=log
        )
    try:
        yield recipe, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def prometheus(run: tuple[Recipe, subprocess.Popen[bytes]], tmp_path: Path) -> Iterator[Prometheus]:
    folder = tmp_path / "prometheus"
    write_dashboards(folder)
    targets = [{"targets": [f"127.0.0.1:{run[0].train.metrics_port}"]}]
    (folder / "targets" / "runs.json").write_text(json.dumps(targets))
    yield from serve(folder, lambda config: None)


def numbers(server: Prometheus, expr: str, wanted: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The series of `expr` once all `wanted` are there with numbers; until then none."""
    found = server.series(expr.replace("$__rate_interval", "15s").replace("$run", "tiny"))
    labels = {pair for row in found for pair in row["metric"].items()}
    if not wanted <= labels or any(math.isnan(float(row["value"][1])) for row in found):
        return []
    return found


def losses(recipe: Recipe) -> set[float]:
    rows = map(json.loads, RunLayout(recipe.run_dir).events.read_text().splitlines())
    return {row["loss"] for row in rows if row["event"] == "step"}


def test_a_live_run_fills_the_dashboard_of_training(
    run: tuple[Recipe, subprocess.Popen[bytes]], prometheus: Prometheus
) -> None:
    recipe, process = run
    asked = 0
    for panel in panels():
        if not OF_THE_CACHE.isdisjoint(panel.metrics) or panel.metrics == (t.DATA_SKIPPED,):
            continue
        for query in panel.queries:
            wanted = SERIES.get(panel.title, set())
            found = wait_for(lambda e=query.expr, w=wanted: numbers(prometheus, e, w), PATIENCE_S)
            assert all(row["metric"].get("run") == "tiny" for row in found), query.expr
            asked += 1
    assert asked >= 8

    (shown,) = prometheus.series(f'{t.TRAIN_LOSS.name}{{run="tiny", term="loss"}}')
    assert float(shown["value"][1]) in losses(recipe), "the very number of events.jsonl"
    (done,) = numbers(prometheus, f"{t.TRAIN_STEP.name} / {t.TRAIN_STEPS.name}", set())
    assert 0 < float(done["value"][1]) < 1
    (up,) = prometheus.series("up")
    assert up["value"][1] == "1"

    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == EXIT_RUN_AGAIN
    wait_for(lambda: [row for row in prometheus.series("up") if row["value"][1] == "0"])
