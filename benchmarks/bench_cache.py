"""The target cache: reading, writing and decoding records, and the job that fills it.

    python benchmarks/bench_cache.py [--rounds 3]

Records are those of ViT-B targets (width 768) of 256 x 128 views, int8, in one tar. Random rows
are read against a copy of as many bytes (numpy), in GB per CPU second. The job is one
`ShardWorker` with a random ViT-Ti as teacher, against the bare forward of that teacher on pixels
that are ready.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from inputs import BATCH, made_header, made_recipe, made_records, made_tokens, one_thread
from timing import interleave, table

from data_tools.feature_cache import TargetCache, open_cache_store, series_of
from data_tools.shard import map_file
from data_tools.target_tar import TargetShard, TargetTarBuilder
from dpal.base.recipe import Recipe
from dpal.record import damaged_rows, spec_numbers
from dpal.targets import decode_batch, encode_batch
from dpal.views import ViewPlan
from jobs.cache_worker import ShardWorker

ROWS = 1024
WIDTH = 768


def measure_records(recipe: Recipe, folder: Path, rounds: int) -> None:
    """Print the rates of one tar of records."""
    header, plan = made_header(recipe, WIDTH), ViewPlan(recipe.seed, recipe.views)
    layout = header.layout("view")
    records = made_records(header, "view", BATCH, plan)
    builder = TargetTarBuilder([f"{i:06d}" for i in range(ROWS)], layout)
    for start in range(0, ROWS, BATCH):
        builder.fill(start, records)
    path = folder / "targets.tar"
    path.write_bytes(builder.to_bytes())
    shard = TargetShard(map_file(path, str(path)), layout, str(path))
    picks = np.random.default_rng(0).permutation(ROWS).reshape(-1, BATCH)
    source = np.concatenate([shard.records(rows.tolist()) for rows in picks])
    cls, patches = made_tokens(BATCH, layout.num_patches, WIDTH)
    size = (plan.views.height, plan.views.width)
    specs = np.stack([spec_numbers(plan.base(str(i), 0, size)) for i in range(BATCH)])
    parts = np.split(source, ROWS // BATCH)
    buffer = np.empty_like(parts[0])
    work = {
        "numpy copy (limit)": lambda: [np.copyto(buffer, part) for part in parts],
        "the same into fresh memory": lambda: [part.copy() for part in parts],
        "read random rows, checked": lambda: [shard.records(rows.tolist()) for rows in picks],
        "crc32 of the rows alone": lambda: damaged_rows(source, layout),
        "decode to float32": lambda: [decode_batch(part, header, "view") for part in parts],
        "encode": lambda: [encode_batch(cls, patches, specs, header, "view") for _ in parts],
    }
    timings = interleave(work, rounds)
    copied, gigabytes = timings["numpy copy (limit)"], ROWS * layout.num_bytes / 1e9
    rows = [
        (name, gigabytes / t.median, ROWS / t.median, f"{1 / t.over(copied):.2f}")
        for name, t in timings.items()
    ]
    print(f"\n{ROWS} records of {layout.num_bytes:,} bytes, batches of {BATCH}")
    print(table(("", "GB per CPU second", "records per CPU second", "of the copy's rate"), rows))


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
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = made_recipe(folder, height=256, count=2 * BATCH)
        measure_records(recipe, folder, arguments.rounds)
        measure_job(recipe, folder, arguments.rounds)


if __name__ == "__main__":
    main()
