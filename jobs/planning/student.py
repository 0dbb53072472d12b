"""How fast a student trains: a process of its own, as the engine changes the one it runs in.

    python -m jobs.planning.student RECIPE THREADS SECONDS     prints one line of JSON

The recipe's shards and targets are there; steps are taken on one batch, which is ready.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from data_tools.backgrounds import load_backgrounds
from data_tools.manifest import manifest_of
from dpal.base.config import load_recipe
from dpal.base.errors import EXIT_DONE, DpalError
from dpal.base.layout import RunLayout
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.batch import Batch
from dpal.engine import Engine
from dpal.method.build import build_task
from dpal.ranks import World
from dpal.task import Moment, Task
from jobs.train import make_loader, target_sources

ALONE = World(0, 1, 0)
Clock = Callable[[], float]


def main(argv: Sequence[str]) -> int:
    """Measure, and print `samples_per_s` and `start_s`: seconds from imports to a first batch."""
    threads, enough_s = int(argv[1]), float(argv[2])
    keep_freed_memory()  # as training does
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = clock_of(device, threads)
    try:
        recipe = load_recipe(Path(argv[0]))
        with training(recipe, with_targets=True) as (task, batches):
            engine = Engine(task, recipe.train, ALONE)
            batch = next(batches)
            start = time.process_time()  # from the beginning of the process
            seconds = repeated(_stepper(recipe, engine, batch), clock, enough_s)
            engine.close()
    except DpalError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"samples_per_s": recipe.train.micro_batch / seconds, "start_s": start}))
    return EXIT_DONE


@contextmanager
def training(recipe: Recipe, *, with_targets: bool) -> Iterator[tuple[Task, Iterator[Batch]]]:
    """A task on cached targets, and batches of its loader, which reads them or leaves them out."""
    manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
    cached = recipe.train.model_copy(update={"targets": "cached"})
    recipe = recipe.model_copy(update={"train": cached})
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, RunLayout(recipe.run_dir).teacher)
    read = caches if with_targets else []
    loader = make_loader(recipe, manifest, pool, task, read, ALONE)
    batches = loader.batches(0)
    try:
        yield task, batches
    finally:
        batches.close()  # type: ignore[attr-defined]


def clock_of(device: str, threads: int) -> Clock:
    """CPU seconds are those of the clock on an idle machine, if there is one thread."""
    return time.process_time if (device, threads) == ("cpu", 1) else time.perf_counter


def repeated(work: Callable[[], object], clock: Clock, enough_s: float) -> float:
    """Median seconds of a piece of work, which is done for so long, and three times at least."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < enough_s:
        start = clock()
        work()
        times.append(clock() - start)
    return median(times)


def _stepper(recipe: Recipe, engine: Engine, batch: Batch) -> Callable[[], None]:
    """A training step on one batch, done once."""
    moment = Moment(0, 1000, recipe.train.micro_batch, recipe.train.micro_batch)

    def step() -> None:
        engine.forward_backward(batch, moment)
        engine.step(recipe.train.lr, last_micro_batch=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
