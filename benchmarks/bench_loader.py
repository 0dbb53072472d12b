"""The training loader against the bare decode loop over the same bytes, per CPU core.

    python benchmarks/bench_loader.py [--rounds 3]

A sample of the loader is a decoded image, its base view, two local crops and a composite, joined
with its two target records. "bare decode" is simplejpeg alone; "decode + render" adds the four
views in a plain loop and is what the loader's own work is measured against.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import simplejpeg
from inputs import BATCH, fill_cache, made_loader, made_recipe, one_thread
from timing import interleave, table

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.decode import decode_rgb
from data_tools.manifest import load_manifest
from data_tools.shard import read_shard
from data_tools.storage import open_store
from dpal.base.recipe import Recipe
from dpal.batch import Batch
from dpal.views.plan import ViewPlan
from dpal.views.render import render, render_composite
from jobs.caching.plan import cache_of

HEIGHTS = (128, 256)
BATCHES = 4  # one turn of a round
FLAT_BATCHES = 40


class Plain:
    """The same images without a loader: bytes in a list."""

    def __init__(self, recipe: Recipe, pool: BackgroundPool) -> None:
        self.plan, self.pool = ViewPlan(recipe.seed, recipe.views), pool
        store = open_store(recipe.data.shards, recipe.storage)
        shards = [read_shard(store, ref, None) for ref in load_manifest(store).shards]
        samples = [(s.keys[i], s.image_bytes(i)) for s in shards for i in range(len(s))]
        self.samples = samples[: BATCHES * BATCH]

    def decode(self) -> None:
        """simplejpeg, nothing else."""
        for _key, data in self.samples:
            simplejpeg.decode_jpeg(data, colorspace="RGB")

    def render(self) -> None:
        """Decode and render the four views of every sample."""
        plan, pool = self.plan, self.pool
        for key, data in self.samples:
            image = decode_rgb(data, 1 << 30)
            size = (image.shape[0], image.shape[1])
            render(image, plan.base(key, 0, size), plan.size)
            for crop in plan.crops(key, 0, 0, size):
                render(image, crop, plan.crop_size)
            spec = plan.composite(key, 0, size, pool.sizes)
            render_composite(image, pool.images[spec.background], spec, plan)


def take(batches: Iterator[Batch], count: int) -> None:
    """Take batches, and let the loader make as many again before others have their turn."""
    for _ in range(count):
        next(batches)
    busy = True
    while busy:
        before = time.process_time()
        time.sleep(0.3)
        busy = time.process_time() - before > 0.02


def measure(recipe: Recipe, rounds: int) -> None:
    """Print one data set's rates, time to the first batch, and growth of memory."""
    store, pool = open_store(recipe.data.shards, recipe.storage), load_backgrounds(recipe)
    caches, plain = [cache_of(recipe, load_manifest(store), pool)], Plain(recipe, pool)
    begin = time.perf_counter()
    batches = made_loader(recipe, pool, caches).batches(0)
    next(batches)
    first = time.perf_counter() - begin
    take(batches, 0)
    work = {
        "bare decode": plain.decode,
        "decode + render": plain.render,
        "loader": lambda: take(batches, BATCHES),
    }
    timings = interleave(work, rounds)
    loader, count = timings["loader"], BATCHES * BATCH
    rows = [
        (name, count / t.median, f"{t.over(loader):.2f}", f"{1e6 * t.median / count:.0f}")
        for name, t in timings.items()
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    take(batches, FLAT_BATCHES)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    batches.close()  # type: ignore[attr-defined]
    print(f"\nimages and views of {recipe.views.height} x {recipe.views.width}")
    print(table(("", "images per CPU second", "rate of loader / its rate", "us/image"), rows))
    print(f"first batch after {first:.2f} s; {FLAT_BATCHES} more batches: {grown:+.1f} MB at peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        for height in HEIGHTS:
            place = Path(folder) / str(height)
            place.mkdir()
            recipe = made_recipe(place, height=height, count=4 * BATCH)
            fill_cache(recipe)
            measure(recipe, arguments.rounds)


if __name__ == "__main__":
    main()
