"""The sample order: what it costs, and how well it mixes.

    python benchmarks/bench_order.py

Mixing is told by three numbers, for the global batches of an epoch:

    shards     different shards in a batch of 64
    together   pairs of samples of one shard in a batch, over what a whole shuffle would give
    spread     part of the epoch over which a shard's samples are spread (10th to 90th percentile
               of their positions, over the 80 % that a whole shuffle would give)
"""

import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
from timing import table

from data_tools.order import Order

BATCH, SHARDS, SAMPLES = 64, 1000, 500
LANES_AND_WINDOWS = ((1, 4), (16, 2), (16, 4), (16, 8), (64, 1), (64, 4), (64, 8))


def lane_order(lanes: int, window: int) -> np.ndarray:
    """Shard of every sample of an epoch, in the order of this project."""
    order = Order(0, (SAMPLES,) * SHARDS, global_batch=BATCH, lanes=lanes, window=window)
    places = order.places(0, SHARDS * SAMPLES // BATCH * BATCH)
    return np.array([place.shard for place in places])


def whole_shuffle() -> np.ndarray:
    """Shard of every sample when all samples are permuted."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(SHARDS), SAMPLES))


def buffer_shuffle(size: int) -> np.ndarray:
    """Shard of every sample when shuffled shards run through a buffer that is drawn from."""
    rng = np.random.default_rng(0)
    stream = np.repeat(rng.permutation(SHARDS), SAMPLES)
    buffer, found = list(stream[:size]), []
    for shard in stream[size:]:
        at = int(rng.integers(size))
        found.append(buffer[at])
        buffer[at] = shard
    return np.array(found + [buffer[i] for i in rng.permutation(len(buffer))])


def mixing(shards: np.ndarray) -> tuple[float, float, float]:
    """Different shards in a batch, pairs together, spread (see above) of a sequence of shards."""
    batches = shards[: len(shards) // BATCH * BATCH].reshape(-1, BATCH)
    different = float(np.mean([len(np.unique(batch)) for batch in batches]))
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    pairs = float(np.mean([(n * (n - 1) / 2).sum() for n in counts]))
    expected = BATCH * (BATCH - 1) / 2 * (SAMPLES - 1) / (SAMPLES * SHARDS - 1)
    spreads = []
    for shard in range(0, SHARDS, 10):
        low, high = np.percentile(np.flatnonzero(shards == shard), (10, 90))
        spreads.append((high - low) / len(shards) / 0.8)
    return different, pairs / expected, float(np.mean(spreads))


def cost(samples: int, per_shard: int = 1000) -> Sequence[object]:
    """Samples, time to the first batch and to one in the middle, ns a sample, peak memory."""
    sizes = (per_shard,) * (samples // per_shard)
    tracemalloc.start()
    Order(0, sizes, global_batch=BATCH, lanes=64, window=4).places(0, 100 * BATCH)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    begin = time.perf_counter()
    order = Order(0, sizes, global_batch=BATCH, lanes=64, window=4)
    order.places(0, BATCH)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    fresh = Order(0, sizes, global_batch=BATCH, lanes=64, window=4)
    fresh.places(samples * 7 // 2 // BATCH * BATCH, BATCH)
    seek = time.perf_counter() - begin
    begin, count = time.process_time(), 200 * BATCH
    order.places(BATCH, count)
    each = (time.process_time() - begin) / count
    return (
        f"{samples:,}",
        f"{1e3 * first:.0f}",
        f"{1e3 * seek:.0f}",
        f"{1e9 * each:.0f}",
        f"{peak:.1f}",
    )


def main() -> None:
    rows = [
        (f"{lanes} lanes, window {window}", *mixing(lane_order(lanes, window)))
        for lanes, window in LANES_AND_WINDOWS
    ]
    rows += [
        (f"shuffled shards, buffer of {size:,}", *mixing(buffer_shuffle(size)))
        for size in (1_000, 10_000)
    ]
    rows.append(("whole shuffle", *mixing(whole_shuffle())))
    print(f"\n{SHARDS} shards of {SAMPLES} samples, batches of {BATCH}")
    print(table(("", "shards", "together", "spread"), rows))
    print()
    head = ("samples", "first batch, ms", "in epoch 3, ms", "ns a sample", "peak MB")
    print(table(head, [cost(samples) for samples in (10**5, 10**6, 10**7)]))


if __name__ == "__main__":
    main()
