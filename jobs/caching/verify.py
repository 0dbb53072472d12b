"""`dpal cache RECIPE --verify N`: stored records beside what the cache job would write now.

`dpal parity` asks whether training sees what the teacher says; this asks whether the stored bytes
are those of the job: the same reader, renderer, teacher and encoder, on records drawn by a seed.

Equal bytes are promised where device, thread count and library versions are the job's own, since
another one may add up in another order. So what is accepted is what `dpal.parity` accepts.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_tools.feature_cache import finished_part, kind_of, series_of
from data_tools.manifest import ShardRef
from data_tools.shard import Shard, read_shard
from dpal.base.errors import EXIT_DATA, EXIT_DONE, ConfigError
from dpal.base.recipe import Recipe
from dpal.chance import generator
from dpal.parity import bounds_of, compare
from dpal.targets.coding import encode_batch
from jobs.caching.plan import single_teacher_recipes, teacher_names
from jobs.caching.worker import ShardWorker

SHOWN = 20  # differing records that are listed


class Checked(NamedTuple):
    """One record.

    Attributes:
        what: series, key and shard.
        equal: whether every byte is.
        steps: largest difference of a patch number, in steps of the codec.
        excess: largest difference as a share of what is accepted.
        cosine: smallest cosine of a token.
    """

    what: str
    equal: bool
    steps: float
    excess: float
    cosine: float


def run_verify(recipe: Recipe, count: int, seed: int = 0) -> int:
    """Recompute `count` records of every teacher's cache, print what differs; returns exit code.

    0 when all records are what the job would write, 3 when one is not.

    Raises:
        ConfigError: for a count below 1, or a recipe without targets.
        DataError: without a finished shard, or when something cannot be read.
    """
    if count < 1:
        raise ConfigError(f"--verify {count}: accepted is 1 and more")
    if not recipe.aligned_teachers:
        raise ConfigError(f"--verify {count}: method.kind={recipe.method.kind} has no targets")
    wrong = 0
    for name, one in zip(teacher_names(recipe), single_teacher_recipes(recipe), strict=True):
        worker = _worker(one)
        accepted = _accepted(worker)
        checked = list(verify(worker, count, seed))
        differing = [it for it in checked if it.excess > 1 or it.cosine < accepted]
        equal, largest = sum(it.equal for it in checked), max(it.steps for it in checked)
        print(
            f"{name}: {len(checked)} records of {worker.cache.store.url!r}: {equal} are equal byte "
            f"for byte, largest difference {largest:.2g} steps, {len(differing)} differ by more "
            "than is accepted"
        )
        for it in differing[:SHOWN]:
            print(f"  {it.what}: {it.steps:.3g} steps, smallest cosine {it.cosine:.6f}")
        if len(differing) > SHOWN:
            print(f"  and {len(differing) - SHOWN} more")
        wrong += len(differing)
    return EXIT_DATA if wrong else EXIT_DONE


def verify(worker: ShardWorker, count: int, seed: int) -> Iterator[Checked]:
    """Compare `count` drawn records, or all where there are fewer, with recomputed ones.

    Raises:
        DataError: without a finished shard, or when a stored record is damaged.
    """
    cache, series = worker.cache, series_of(worker.recipe.views)
    for ref, drawn in _draw(worker, count, seed).items():
        shard = read_shard(worker.store, ref, None)
        for name in series:
            rows = sorted(row for row, which in drawn if which == name)
            if not rows:
                continue
            targets = cache.shard(name, ref)
            targets.require_keys(shard.keys)
            what = [f"{name} of sample {shard.keys[row]!r}, shard {ref.name!r}" for row in rows]
            yield from _compared(worker, shard, rows, name, targets.records(rows), what)


def _compared(
    worker: ShardWorker,
    shard: Shard,
    rows: Sequence[int],
    name: str,
    stored: np.ndarray,
    what: Sequence[str],
) -> Iterator[Checked]:
    header, kind = worker.cache.header, kind_of(name)
    noise = bounds_of(header.layout(kind).storage, _precision(worker)).noise
    for start, seen, tokens in worker.tokens_of(shard, rows, name):
        cls, patches = tokens.cls.cpu().numpy(), tokens.patches.cpu().numpy()
        there = stored[start : start + len(cls)]
        now = encode_batch(cls, patches, seen.specs, header, kind)
        specs = header.layout(kind).cls_start  # the view's own numbers come first
        apart = compare(there, tokens, header, kind, noise)
        for row in range(len(cls)):
            same_view = np.array_equal(there[row, :specs], now[row, :specs])
            yield Checked(
                what[start + row],
                np.array_equal(there[row], now[row]),
                float(apart.steps[row]),
                float(apart.excess[row]) if same_view else np.inf,
                float(apart.cosines[row].min()),
            )


def _draw(worker: ShardWorker, count: int, seed: int) -> dict[ShardRef, list[tuple[int, str]]]:
    """{shard: (row, series) of its drawn records}, without repetition."""
    manifest = finished_part(worker.manifest, [worker.cache])
    series = series_of(worker.recipe.views)
    ends = np.cumsum([ref.num_samples * len(series) for ref in manifest.shards])
    rng = generator(worker.recipe.seed, "verify", worker.recipe.name, seed)
    drawn: dict[ShardRef, list[tuple[int, str]]] = defaultdict(list)
    for number in np.sort(rng.choice(ends[-1], min(count, int(ends[-1])), replace=False)):
        at = int(np.searchsorted(ends, number, side="right"))
        ref = manifest.shards[at]
        row, which = divmod(int(number - ends[at] + ref.num_samples * len(series)), len(series))
        drawn[ref].append((row, series[which]))
    return drawn


def _worker(recipe: Recipe) -> ShardWorker:
    """The job's own worker, as an actor makes it."""
    threads = max(1, int(recipe.cache.cpus_per_actor))
    device = "cuda" if recipe.cache.gpus_per_actor else "cpu"
    return ShardWorker(recipe, threads=threads, device=device)


def _accepted(worker: ShardWorker) -> float:
    """The smallest cosine that passes."""
    return bounds_of(worker.cache.layout("view-0").storage, _precision(worker)).smallest


def _precision(worker: ShardWorker) -> str:
    return getattr(worker.recipe.teacher, "precision", "fp32")
