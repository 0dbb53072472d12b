"""Training from the cache against training with the teacher in the loop, in one process, in turns.

    python benchmarks/bench_online.py [--rounds 3] [--steps 3] [--batch 16]

DPAL as in jobs/recipes/dpal.yaml but for the batch: ViT-Ti on 256 x 128 views, composites of
256 x 256, two local crops, bf16. The teacher is a ViT-B of random weights. Online, it runs in bf16
and in fp32, which is what recipes have unless they say otherwise. Every arm trains a student of its
own from the same images through `dpal train`'s loader; the cache is filled once, before.

A step is all from the request for a batch to new parameters. The wait for data is that request; the
first steps of a turn, whose batches were made in another's turn, do not count for it. Seconds are
CPU seconds of the process, loader included, and wall seconds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import fill_cache, made_recipe, one_thread
from timing import Timing, cpu_seconds, table, wall_seconds

from data_tools.backgrounds import load_backgrounds
from data_tools.manifest import manifest_of
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.method.build import build_task
from dpal.model.attention import suit_attention
from dpal.optim import build_optimizer
from dpal.ranks import World
from dpal.task import Moment
from jobs.train import make_loader, target_sources

TEACHER = "vit_base_patch16_224"
CACHED = "cached"
PREFETCH = 1  # batches made ahead
TIMES = {"cpu": "CPU seconds", "wall": "wall seconds"}


class Turn(NamedTuple):
    """What some steps took.

    Attributes:
        cpu: CPU seconds a step.
        wall: seconds of the median step.
        wait: share of the time that went by waiting for data.
    """

    cpu: float
    wall: float
    wait: float


class Arm:
    """A student with its loader, its targets and its optimiser."""

    def __init__(self, recipe: Recipe) -> None:
        manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
        sources, caches = target_sources(recipe, manifest, pool)
        self.task: Any = build_task(recipe, sources, Path())
        loader = make_loader(recipe, manifest, pool, self.task, caches, World(0, 1, 0))
        self.batches: Iterator[Any] = loader.batches(0)
        self.optimizer = build_optimizer(self.task, recipe.train)
        self.moment = Moment(0, 100, manifest.num_samples, recipe.train.global_batch)
        with torch.autocast("cpu", torch.bfloat16):
            suit_attention(self.task.student, torch.device("cpu"))

    def turn(self, steps: int) -> Turn:
        """Some optimiser steps."""
        waits, walls, cpu = [], [], cpu_seconds()
        for _ in range(steps):
            begin = wall_seconds()
            batch = next(self.batches)
            waits.append(wall_seconds() - begin)
            with torch.autocast("cpu", torch.bfloat16):
                losses = self.task(batch, self.moment)
            losses.total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            walls.append(wall_seconds() - begin)
        counted = slice(PREFETCH, None)
        wait = sum(waits[counted]) / sum(walls[counted])
        return Turn((cpu_seconds() - cpu) / steps, statistics.median(walls), wait)


def made_arms(folder: Path, batch: int) -> dict[str, Arm]:
    """Shards and a finished cache in `folder`, and a student for each kind of targets."""
    recipe = made_recipe(
        folder,
        height=256,
        count=2 * batch,
        teacher=TEACHER,
        teacher_precision="bf16",
        batch=batch,
    )
    fill_cache(recipe)
    return {
        CACHED: Arm(changed(recipe, "cached", "bf16")),
        **{f"online, teacher in {p}": Arm(changed(recipe, "online", p)) for p in ("bf16", "fp32")},
    }


def changed(recipe: Recipe, targets: str, precision: str) -> Recipe:
    """The recipe with other targets and another precision of the teacher's forward."""
    train = {"targets": targets, "prefetch": PREFETCH, "loader_threads": 1}
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"precision": precision}),
            "train": recipe.train.model_copy(update=train),
        }
    )


def report(turns: dict[str, list[Turn]], batch: int) -> None:
    """Print medians, and the ratio within rounds."""
    rows = []
    for name, of_arm in turns.items():
        cpu, wall = (statistics.median(getattr(turn, key) for turn in of_arm) for key in TIMES)
        wait = statistics.median(turn.wait for turn in of_arm)
        rows.append((name, cpu, batch / cpu, wall, batch / wall, f"{wait:.2%}"))
    head = ("", "CPU s a step", "images per CPU s", "s a step", "images/s", "waiting for data")
    print(f"\nViT-Ti from ViT-B, 256 x 128, batch {batch}, bf16")
    print(table(head, rows))
    for name, of_arm in turns.items():
        for key, unit in TIMES.items() if name != CACHED else ():
            mine, cached = (seconds_of(of, key) for of in (of_arm, turns[CACHED]))
            ratios = [a / b for a, b in zip(mine.seconds, cached.seconds, strict=True)]
            spread = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name} / {CACHED}, {unit}: {mine.over(cached):.2f} ({spread})")


def seconds_of(turns: list[Turn], key: str) -> Timing:
    return Timing(tuple(getattr(turn, key) for turn in turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=PREFETCH + 2)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.steps <= PREFETCH:
        parser.error(f"--steps {arguments.steps}: accepted are more than {PREFETCH}")
    one_thread()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        arms = made_arms(Path(folder), arguments.batch)
        turns: dict[str, list[Turn]] = {name: [] for name in arms}
        for arm in arms.values():
            arm.turn(PREFETCH + 1)
        for _ in range(arguments.rounds):
            for name, arm in arms.items():
                turns[name].append(arm.turn(arguments.steps))
        for arm in arms.values():
            arm.batches.close()  # type: ignore[attr-defined]
        report(turns, arguments.batch)


if __name__ == "__main__":
    main()
