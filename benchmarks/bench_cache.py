"""The target cache: reading, opening and decoding tars of records, and the job that fills them.

    python benchmarks/bench_cache.py [--rounds 5]

Records are those of 256 x 128 views, int8, of a ViT-B (width 768, 100 kB) and of a narrow teacher
(width 120, 16 kB), in one tar that lies in the page cache. Random rows are read against a copy of
as many bytes (numpy) and against other containers, in GB per CPU second; memory that is freed is
kept, as in training. The job is one `ShardWorker` with a random ViT-Ti as teacher, against the bare
forward of that teacher on pixels that are ready.
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from inputs import BATCH, made_header, made_recipe, made_records, made_tokens, one_thread
from target_readers import other_readers
from timing import interleave, table

from data_tools import tar
from data_tools.feature_cache import TargetCache, open_cache_store, series_of
from data_tools.shard import map_file
from data_tools.target_tar import TargetShard, TargetTarBuilder
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.record import damaged_rows, spec_numbers
from dpal.targets.coding import decode_batch, encode_batch
from dpal.targets.header import TargetHeader
from dpal.views.plan import ViewPlan
from jobs.caching.worker import ShardWorker

ROWS = 1024
WIDTHS = (768, 120)


def measure_records(recipe: Recipe, width: int, folder: Path, rounds: int) -> None:
    """Print the rates of one tar of records."""
    header, plan = made_header(recipe, width), ViewPlan(recipe.seed, recipe.views)
    layout = header.layout("view")
    builder = TargetTarBuilder([f"{i:032x}" for i in range(ROWS)], layout)
    for start in range(0, ROWS, BATCH):
        builder.fill(start, made_records(header, "view", BATCH, plan))
    path = folder / "targets.tar"
    path.write_bytes(builder.to_bytes())
    data = map_file(path, str(path))
    shard = TargetShard(data, layout, str(path))
    picks = np.random.default_rng(0).permutation(ROWS).reshape(-1, BATCH).tolist()
    parts = [shard.records(rows) for rows in picks]
    buffer = np.empty_like(parts[0])

    def read(opened: TargetShard, out: np.ndarray | None) -> None:
        for rows in picks:
            opened.records(rows, out)

    work: dict[str, Callable[[], object]] = {
        "numpy copy of batches (limit)": lambda: [np.copyto(buffer, part) for part in parts],
        "the same into new memory": lambda: [part.copy() for part in parts],
        "ours, random rows": lambda: read(shard, buffer),
        "ours, into new memory": lambda: read(shard, None),
        "ours, opened and read for the first time": lambda: read(
            TargetShard(map_file(path, str(path)), layout, str(path)), buffer
        ),
        "crc32 alone": lambda: [damaged_rows(part, layout) for part in parts],
        **other_readers(np.concatenate(parts), picks, folder),
        **coding(parts, header, plan),
    }
    timings = interleave(work, rounds)
    copied, gigabytes = timings["numpy copy of batches (limit)"], ROWS * layout.num_bytes / 1e9
    rows = [
        (name, gigabytes / t.median, ROWS / t.median, f"{1 / t.over(copied):.3f}")
        for name, t in timings.items()
    ]
    print(f"\n{ROWS} records of {layout.num_bytes:,} bytes, batches of {BATCH}")
    print(table(("", "GB per CPU second", "records per CPU second", "of the copy's rate"), rows))


def coding(
    parts: list[np.ndarray], header: TargetHeader, plan: ViewPlan
) -> dict[str, Callable[[], object]]:
    """Decoding and encoding of batches of records [B, R]."""
    cls, patches = made_tokens(BATCH, header.layout("view").num_patches, header.width)
    specs = np.stack([spec_numbers(plan.base(str(i), 0, plan.size)) for i in range(BATCH)])
    return {
        "decode to float32": lambda: [decode_batch(part, header, "view") for part in parts],
        "encode": lambda: [encode_batch(cls, patches, specs, header, "view") for _ in parts],
    }


def measure_opening(recipe: Recipe, folder: Path, rounds: int) -> None:
    """Print what opening costs: headers checked together, against one by one."""
    layout = made_header(recipe, WIDTHS[-1]).layout("view")
    keys = [f"{i:032x}" for i in range(ROWS)]
    targets = TargetTarBuilder(keys, layout).to_bytes()
    images = folder / "images.tar"
    with tarfile.open(images, "w", format=tarfile.USTAR_FORMAT) as out:
        for key in keys:
            for extension, size in (("jpg", 9700), ("json", 180)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = size
                out.addfile(member, io.BytesIO(bytes(size)))
    pixels = map_file(images, str(images))
    work: dict[str, Callable[[], object]] = {
        "targets, together": lambda: TargetShard(targets, layout, ""),
        "targets, one by one": lambda: tar._index_any(targets, ""),
        "images, together": lambda: tar.index_tar(pixels, ""),
        "images, one by one": lambda: tar._index_any(pixels, ""),
    }
    timings = interleave(work, 5 * rounds)
    rows = [(name, t.median / ROWS * 1e6) for name, t in timings.items()]
    print("\nopening, headers checked together or one by one")
    print(table(("", "CPU us per sample"), rows))


def measure_job(recipe: Recipe, folder: Path, rounds: int) -> None:
    """Print the job's rate: every round fills one cache anew, in a folder of its own."""
    made = iter(range(1000))

    def fill() -> None:
        url = str(folder / f"cache-{next(made)}")
        cache = recipe.cache.model_copy(update={"url": url})
        worker = ShardWorker(recipe.model_copy(update={"cache": cache}))
        worker.teacher = first.teacher  # loaded and warm in both
        TargetCache.publish(open_cache_store(worker.recipe, worker.definition), header)
        for ref in worker.manifest.shards:
            worker.cache_shard(ref)

    first = ShardWorker(recipe)
    header = first.calibrate().header
    height, width = first.plan.size
    views = torch.zeros(BATCH, height, width, 3, dtype=torch.uint8)
    composites = torch.zeros(BATCH, height, height, 3, dtype=torch.uint8)
    count = first.manifest.num_samples

    def forward() -> None:
        for name in series_of(recipe.views):
            for _ in range(count // BATCH):
                first.teacher(composites if name.startswith("composite") else views)

    timings = interleave({"bare forward (limit)": forward, "cache job": fill}, rounds)
    seen, bare = count * len(series_of(recipe.views)), timings["bare forward (limit)"]
    rows = [(name, seen / t.median, f"{1 / t.over(bare):.2f}") for name, t in timings.items()]
    print(f"\nteacher ViT-Ti fp32, views of {height} x {width}, {count} images x 3 views")
    print(table(("", "views per CPU second", "of the forward's rate"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    one_thread()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = made_recipe(folder, height=256, count=2 * BATCH)
        for width in WIDTHS:
            measure_records(recipe, width, folder, arguments.rounds)
        measure_opening(recipe, folder, arguments.rounds)
        measure_job(recipe, folder, arguments.rounds)


if __name__ == "__main__":
    main()
