"""Is a plan true? What `dpal plan` predicts, against runs of the same recipe on this machine.

    python benchmarks/bench_plan.py [--sizes 256 1024] [--steps 50]

Rates are measured first, as `dpal plan --measure` does. Then, at each size, drawn persons are
sharded, their targets cached (`ShardWorker`, no Ray), and a student is trained with cached and with
online targets. Bytes are those of the files. Seconds are CPU seconds of one core, so a node of one
core is planned for. Ends with 1 if bytes are more than 2 % off, or seconds by more than 1.5 times.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from inputs import made_recipe, one_thread
from timing import table

from data_tools.feature_cache import open_cache_store
from data_tools.manifest import manifest_of
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from jobs.caching.worker import ShardWorker
from jobs.planning.measure import measure
from jobs.planning.model import cache_phase, train_phase
from jobs.planning.rates import Node, Rates, Start
from jobs.planning.workload import Size, sharded_bytes, workload

BYTES_OFF, SECONDS_OFF = 1.02, 1.5


class Row(NamedTuple):
    """One figure: predicted and measured, and by what factor they may differ."""

    what: str
    unit: str
    predicted: float
    measured: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def holds(self) -> bool:
        """Whether the prediction is near enough."""
        return 1 / self.allowed <= self.ratio <= self.allowed


def rates_of(folder: Path, count: int) -> Rates:
    """This machine's rates, for a node of one core; CPU seconds know no start of Ray."""
    folder.mkdir()
    recipe = small_recipe(folder, count)
    place = folder / "measured"
    place.mkdir()
    rates = measure(recipe, place)
    start = Start(cache_s=0.0, train_s=rates.start.train_s)
    node = Node(devices=1, cores=1, teacher_cores=1, student_cores=1)
    return rates.model_copy(update={"start": start, "node": node})


def small_recipe(folder: Path, count: int) -> Recipe:
    """Views of 128 x 64, a random ViT-Ti as teacher; decoding between two steps."""
    recipe = made_recipe(folder, height=128, count=count)
    train = recipe.train.model_copy(update={"loader_threads": 0})
    return recipe.model_copy(update={"train": train})


def check(folder: Path, count: int, steps: int, rates: Rates) -> list[Row]:
    """Every figure at one size."""
    folder.mkdir()
    recipe = small_recipe(folder, count)
    train = recipe.train.model_copy(update={"duration": f"{steps} steps"})
    recipe = recipe.model_copy(update={"train": train})
    work = workload(recipe, rates, Size())
    manifest = manifest_of(recipe)
    on_disk = float(sum(ref.num_bytes for ref in manifest.shards))
    images = [path.stat().st_size for path in (folder / "persons").iterdir()]
    per_shard = min(count, recipe.data.samples_per_shard)
    guessed = count * sharded_bytes(sum(images) / count, per_shard)
    worker = ShardWorker(recipe)
    worker.calibrate()  # imports and the teacher's first forward are not the job
    store = open_cache_store(recipe, worker.definition)

    def fill() -> None:
        for ref in worker.manifest.shards:
            worker.cache_shard(ref)

    filled = seconds_of(fill)
    targets = float(sum(store.size(name) for name in store.list("")))
    cached = train_seconds(recipe, folder, "cached")
    online = train_seconds(recipe, folder, "online")
    uncalibrated = replace(work, calibration_images=0)  # both are there
    pairs = [
        ("shards, from their manifest", "MB", work.shard_bytes / 1e6, on_disk / 1e6, BYTES_OFF),
        ("shards, from the mean image", "MB", guessed / 1e6, on_disk / 1e6, BYTES_OFF),
        ("target cache, whole folder", "MB", work.target_bytes / 1e6, targets / 1e6, BYTES_OFF),
        ("cache job", "s", cache_phase(uncalibrated, rates).seconds, filled, SECONDS_OFF),
        (
            f"{steps} steps, cached targets",
            "s",
            train_phase(uncalibrated, rates, online=False).seconds,
            cached,
            SECONDS_OFF,
        ),
        (
            f"{steps} steps, online teacher",
            "s",
            train_phase(uncalibrated, rates, online=True).seconds,
            online,
            SECONDS_OFF,
        ),
    ]
    return [Row(*pair) for pair in pairs]


def train_seconds(recipe: Recipe, folder: Path, targets: str) -> float:
    """CPU seconds of `dpal train` from start values to the end, imports and all."""
    train = recipe.train.model_copy(update={"targets": targets})
    recipe = recipe.model_copy(update={"name": targets, "train": train})
    path = folder / f"{targets}.yaml"
    path.write_text(recipe.to_yaml())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "jobs", "train", str(path)], check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_of(work: Callable[[], None]) -> float:
    """CPU seconds."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(256, 1024))
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    one_thread()
    keep_freed_memory()
    holds = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = rates_of(folder / "rates", 64)
        for count in arguments.sizes:
            rows = check(folder / str(count), count, arguments.steps, rates)
            shown = [
                (row.what, row.unit, row.predicted, row.measured, f"{row.ratio:.3f}")
                for row in rows
            ]
            print(f"\n{count} images")
            print(table(("", "unit", "predicted", "measured", "ratio"), shown))
            holds &= all(row.holds for row in rows)
    print("\nall within" if holds else "\nNOT all within", "2 % in bytes, 1.5 times in seconds")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
