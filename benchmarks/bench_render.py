"""Who renders the views: the loader with each `train.render`, and the device that renders instead.

    python benchmarks/bench_render.py [--device cuda] [--rounds 5] [--large-batch 256]

A sample is a base view, two local crops and a composite. Rates of the loader are images per CPU
second of one core; those of a device are per second of it: CPU seconds on a CPU, else wall clock
with a batch's upload in it. Before anything is timed, the pixels of both ways are compared.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from inputs import BATCH, made_loader, made_recipe, one_thread
from timing import Clock, interleave, table, wall_seconds

from data_tools.backgrounds import load_backgrounds
from data_tools.manifest import load_manifest
from data_tools.shard import read_shard
from data_tools.storage import open_store
from dpal.base.recipe import Recipe
from dpal.batch import Pairs, Pictures, RawBatch, TrainBatch
from dpal.device_render import DeviceRenderer
from dpal.views.plan import ViewPlan

Work = dict[str, Callable[[], object]]
# Height of the images, height of the base view.
CASES = ((128, 128), (256, 256), (512, 256))


def main() -> None:
    """Print one table for each size of images and views."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--large-batch", type=int, default=256, help="samples that an accelerator renders at once"
    )
    arguments = parser.parse_args()
    one_thread()
    device = torch.device(arguments.device)
    for height, shown in CASES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = sized(made_recipe(Path(folder), height=height, count=4 * BATCH), shown)
            repeats = 1 if device.type == "cpu" else arguments.large_batch // BATCH
            measure(recipe, height, device, arguments.rounds, repeats)


def sized(recipe: Recipe, height: int) -> Recipe:
    """The same images with views of another height."""
    size = {"height": height, "width": height // 2}
    sections = {"views": recipe.views, "student": recipe.student}
    return recipe.model_copy(
        update={name: section.model_copy(update=size) for name, section in sections.items()}
    )


def rendered_by(recipe: Recipe, who: str) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"render": who})})


def measure(recipe: Recipe, height: int, device: torch.device, rounds: int, repeats: int) -> None:
    """Compare the pixels, then print the rates of the loader and of the device."""
    by_loader, raw = batches_of(recipe, "loader"), batches_of(recipe, "device")
    renderer, batch = DeviceRenderer(ViewPlan(recipe.seed, recipe.views)), next(raw)
    assert isinstance(batch, RawBatch)
    views = recipe.views
    print(f"\nimages of {height} x {height // 2}, views of {views.height} x {views.width}")
    expected = next(by_loader)
    print(f"{differing(expected, renderer(batch, device))} on {device.type} are not the loader's")
    print(f"a batch of {BATCH}: {size_of(expected):.1f} MB rendered, {size_of(batch):.1f} MB raw")
    of_loader: Work = {
        "bare decode": bare_decode(recipe),
        "loader, render=device": lambda: next(raw),
        "loader, render=loader": lambda: next(by_loader),
    }
    large = repeated(batch, repeats)
    of_device: Work = {f"rendering on {device.type}": lambda: renderer(large, device)}
    if device.type == "cpu":
        timings = interleave({**of_loader, **of_device}, rounds)
    else:
        timings = interleave(of_loader, rounds)
        timings |= interleave(of_device, rounds, clock=clock_of(device))
    loader, rows = timings["loader, render=loader"], []
    for name, timing in timings.items():
        count = BATCH * (repeats if name in of_device else 1)
        ratio = count / BATCH / timing.over(loader)
        us = 1e6 * timing.median / count
        rows.append((name, count / timing.median, f"{ratio:.2f}", f"{us:.0f}"))
    print(table(("", "images/s", "of render=loader", "us/image"), rows))


def batches_of(recipe: Recipe, who: str) -> Iterator[Any]:
    """Batches that are made when they are asked for, by the thread that asks."""
    pool = load_backgrounds(recipe)
    return made_loader(rendered_by(recipe, who), pool, threads=0, prefetch=0).batches(0)


def bare_decode(recipe: Recipe) -> Callable[[], None]:
    store = open_store(recipe.data.shards, recipe.storage)
    shard = read_shard(store, load_manifest(store).shards[0], None)
    images = [shard.image_bytes(i) for i in range(BATCH)]

    def decode() -> None:
        for data in images:
            simplejpeg.decode_jpeg(data, colorspace="RGB")

    return decode


def differing(expected: TrainBatch, rendered: TrainBatch) -> str:
    """How many values of how many are not those that the loader rendered."""
    wrong = total = 0
    for name in ("base", "crops", "composite"):
        mine = torch.as_tensor(getattr(expected, name))
        wrong += int((mine != getattr(rendered, name).cpu()).sum())
        total += mine.numel()
    return f"{wrong:,} of {total:,} values"


def size_of(batch: TrainBatch | RawBatch) -> float:
    """Megabytes of pixels that go to the device with a batch."""
    if isinstance(batch, RawBatch):
        return batch.originals.pixels.nbytes / 1e6
    return sum(np.asarray(part).nbytes for part in (batch.base, batch.crops, batch.composite)) / 1e6


def repeated(batch: RawBatch, times: int) -> RawBatch:
    """The same samples several times in one batch."""
    if times == 1:
        return batch
    assert batch.pairs is not None
    count = len(batch.keys)
    step = np.repeat(np.arange(times) * count, count)  # by how much a row's picture moves

    def moved(numbers: np.ndarray) -> np.ndarray:
        copies = np.concatenate([numbers] * times)
        copies[..., 0] += step.reshape(-1, *(1,) * (copies.ndim - 2))
        return copies

    pairs = batch.pairs
    originals = batch.originals
    return replace(
        batch,
        keys=batch.keys * times,
        originals=Pictures(*(np.concatenate([part] * times) for part in originals)),
        base=moved(batch.base),
        crops=moved(batch.crops),
        pairs=Pairs(
            np.concatenate([pairs.background] * times),
            moved(pairs.persons),
            np.concatenate([pairs.corners] * times),
        ),
    )


def clock_of(device: torch.device) -> Clock:
    """Wall clock that waits for the device."""

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return wall_seconds()

    return synchronised


if __name__ == "__main__":
    main()
