"""The global sample sequence of a run, as a pure function of the seed and the shard sizes.

Position p of the sequence belongs to optimiser step p // global_batch, whatever the number of
ranks; the sequence runs from one epoch into the next without dropping anything. Within an epoch
the shards are permuted and read a window at a time; the samples of a window are permuted among
each other. State is one integer, and only the current window is ever written down.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

WINDOW_SHARDS = 8


class Place(NamedTuple):
    """Where one element of the sequence lies: epoch, index of its shard, row in the shard."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class Order:
    """Sample order over `shard_sizes` samples; every sample exactly once an epoch."""

    seed: int
    shard_sizes: tuple[int, ...]
    window: int = WINDOW_SHARDS

    @cached_property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_sizes)

    def places(self, start: int, count: int) -> Iterator[Place]:
        """Elements `start` to `start + count - 1` of the endless sequence."""
        for position in range(start, start + count):
            epoch, offset = divmod(position, self.num_samples)
            shards, ends = _epoch(self, epoch)
            window = int(np.searchsorted(ends, offset, side="right"))
            first = int(ends[window - 1]) if window else 0
            shard, row = _window(self, epoch, window)[offset - first]
            yield Place(epoch, int(shards[shard]), int(row))


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[IntArray, IntArray]:
    """Permuted shard indices, and the offset at which each window ends."""
    shards = np.random.default_rng((order.seed, epoch)).permutation(len(order.shard_sizes))
    sizes = np.array(order.shard_sizes, dtype=np.int64)[shards]
    last_of_window = np.arange(order.window - 1, len(shards) + order.window - 1, order.window)
    ends = sizes.cumsum()[np.minimum(last_of_window, len(shards) - 1)]
    return shards, np.unique(ends)


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> IntArray:
    """Samples of a window in the order they are read: [n, 2] of (place in `shards`, row)."""
    shards, _ends = _epoch(order, epoch)
    places = range(window * order.window, min((window + 1) * order.window, len(shards)))
    rows = [(place, row) for place in places for row in range(order.shard_sizes[shards[place]])]
    rng = np.random.default_rng((order.seed, epoch, window))
    return rng.permutation(np.array(rows, dtype=np.int64))
