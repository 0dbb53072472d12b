"""The whole cache job on Ray, with one actor, against the bare forward of its teacher.

    python benchmarks/bench_cache_job.py [--images 256] [--rounds 3]

The job decodes, renders, runs the teacher, encodes and publishes; the bare forward runs the same
teacher in the same batches on pixels that are ready. Both take turns. CPU seconds are those of this
process and of the actor, so they count all that the job costs; seconds of the wall clock also see
what overlaps. Starting Ray and loading the teacher are told apart: they are paid once for a job.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from inputs import BATCH, made_recipe, one_thread
from timing import Timing, cpu_seconds, interleave, table

from data_tools.feature_cache import series_of
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal
from jobs.caching.ray_job import Crew
from jobs.caching.session import open_session
from jobs.caching.worker import ShardWorker

BAR = 0.90  # of the forward's rate


class Job:
    """A started job; calling it fills the cache anew."""

    def __init__(self, crew: Crew, worker: ShardWorker) -> None:
        self.crew, self.worker = crew, worker
        (self.actor,) = (
            process
            for process in psutil.Process().children(recursive=True)
            if "TeacherActor" in " ".join(process.cmdline())
        )

    def __call__(self) -> None:
        """Cache every shard; what an earlier call published is deleted first."""
        folder = self.worker.cache.store.path("ledger").parent
        for name in ("ledger", *series_of(self.worker.recipe.views)):
            shutil.rmtree(folder / name, ignore_errors=True)
        refs = self.worker.manifest.shards
        views = sum(seen for _ref, seen in self.crew.work(refs))
        assert views == num_views(self.worker), "a shard was not computed"

    def cpu_seconds(self) -> float:
        """Of driver and actor."""
        times = self.actor.cpu_times()
        return cpu_seconds() + times.user + times.system


def num_views(worker: ShardWorker) -> int:
    """Views that a job computes."""
    return worker.manifest.num_samples * len(series_of(worker.recipe.views))


def bare_forward(worker: ShardWorker) -> Callable[[], None]:
    """The teacher on as many views of the same shapes, in the same batches."""
    height, width = worker.plan.size
    views = torch.zeros(BATCH, height, width, 3, dtype=torch.uint8)
    composites = torch.zeros(BATCH, height, height, 3, dtype=torch.uint8)

    def forward() -> None:
        for name in series_of(worker.recipe.views):
            for _ in range(worker.manifest.num_samples // BATCH):
                worker.teacher(composites if name.startswith("composite") else views)

    return forward


def measure(recipe: Recipe, rounds: int) -> None:
    """Print both rates, by both clocks."""
    begin, worker = time.monotonic(), ShardWorker(recipe)
    with open_session(recipe) as session:
        joined = time.monotonic()
        crew = Crew(session, recipe, StopSignal())
        crew.hire()
        crew.await_first()
        ready, job = time.monotonic(), Job(crew, worker)
        walls: dict[str, list[float]] = {"bare forward (limit)": [], "Ray job": []}
        work = {
            name: _walled(run, walls[name])
            for name, run in zip(walls, (bare_forward(worker), job), strict=True)
        }
        cpu = interleave(work, rounds, clock=job.cpu_seconds)
    wall = {name: Timing(tuple(seconds[-rounds:])) for name, seconds in walls.items()}
    count = num_views(worker)
    rows = []
    for clock, timings in (("CPU", cpu), ("wall", wall)):
        bare = timings["bare forward (limit)"]
        rows += [
            (f"{name}, {clock}", count / t.median, f"{1 / t.over(bare):.2f}")
            for name, t in timings.items()
        ]
    print(f"\n{count} views, teacher ViT-Ti, batches of {BATCH}, one actor with one thread")
    print(f"Ray {joined - begin:.0f} s, teacher and calibration {ready - joined:.0f} s: paid once")
    print(table(("", "views per second", "of the forward's rate"), rows))
    job_bare = cpu["bare forward (limit)"]
    reached = 1 / cpu["Ray job"].over(job_bare)
    print(f"bar {BAR:.2f} of the forward's rate: {'met' if reached >= BAR else 'NOT MET'}")


def _walled(run: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    def timed() -> None:
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory(prefix="b") as name:
        recipe = made_recipe(Path(name), height=256, count=arguments.images)
        measure(recipe, arguments.rounds)


if __name__ == "__main__":
    main()
