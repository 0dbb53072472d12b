"""The global sample sequence of a run, as a pure function of a few numbers: the lane scheme.

An epoch's shards are permuted and laid end to end; the line is cut into `lanes` equal lanes. A
lane is read a window of shards at a time, and the samples of a window are permuted among each
other. Draw number d of the endless sequence comes from lane d mod lanes, so every global batch
takes the same share of every lane, whatever the number of ranks; a rank owns whole lanes, so a
shard is read by one rank, or by two where a cut between them goes through it. One epoch runs into
the next without dropping or repeating anything.

    epoch line   |  shard 7  | shard 2 | shard 9 |  shard 0  | shard 4 | ...
    lanes        |      lane 0      |      lane 1      |      lane 2   ...
                  ------- reads ---> <--- reads ------- ------- reads --->

Odd lanes read backwards: the two lanes that share a cut shard then need it at the same time.
The state of a run is its step; memory holds one permutation of the shards and the windows in use.

Legend: d draw, e epoch, N samples of an epoch, C lanes, j draws of one lane since the beginning.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where one element of the sequence lies: epoch, index of its shard, row in the shard."""

    epoch: int
    shard: int
    row: int


class Window(NamedTuple):
    """A few neighbouring pieces of shards whose samples are mixed.

    Attributes:
        begin: what the lane has drawn in this epoch before it.
        low, high: the stretch of the epoch's line.
        shards: whose pieces these are, in the order the lane comes to them.
    """

    begin: int
    low: int
    high: int
    shards: tuple[int, ...]


class Line(NamedTuple):
    """An epoch's shards end to end: their indices, and where on the line each ends."""

    shards: IntArray
    ends: IntArray


class Drawn(NamedTuple):
    """A lane's window in the order it is drawn: shard and row of every sample.

    Attributes:
        begin, end: the lane's turns in which it is drawn.
    """

    begin: int
    end: int
    epoch: int
    shards: IntArray
    rows: IntArray


def num_lanes(lanes: int, global_batch: int) -> int:
    """Lanes that a run really has: every global batch takes the same share of each of them."""
    return math.gcd(lanes, global_batch)


class Order:
    """Sample order over shards; every sample exactly once an epoch.

    Args:
        seed: of all permutations.
        shard_sizes: samples of every shard.
        global_batch: samples of one optimiser step.
        lanes: `num_lanes` of them are used; any number of ranks that divides those can share them.
        window: shards that a lane mixes at a time.
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: Sequence[int],
        *,
        global_batch: int,
        lanes: int,
        window: int,
    ) -> None:
        self.seed, self.global_batch, self.window = seed, global_batch, window
        self.lanes = num_lanes(lanes, global_batch)
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        # A batch may lie in two epochs, and the next window is asked for ahead of its time.
        self._line = lru_cache(maxsize=3)(self._lay_out)
        self._lane = lru_cache(maxsize=3 * self.lanes)(self._cut)
        self._drawn: dict[int, Drawn] = {}  # by lane, the window that was asked for last

    def shards_at_once(self, world_size: int) -> int:
        """Shards that a rank reads from or has asked for at a time, at most."""
        return min(len(self._sizes), self.lanes // world_size * 2 * (self.window + 1))

    def places(self, start: int, count: int) -> list[Place]:
        """Elements `start` to `start + count - 1` of the endless sequence, lane by lane in a batch.

        A contiguous slice of a global batch is thus a slice of its lanes.
        """
        share = self.global_batch // self.lanes
        places = []
        for position in range(start, start + count):
            step, rest = divmod(position, self.global_batch)
            lane, turn = divmod(rest, share)
            turn += step * share
            drawn = self._drawn.get(lane)
            if drawn is None or not drawn.begin <= turn < drawn.end:
                drawn = self._drawn[lane] = self._mix(lane, turn)
            at = turn - drawn.begin
            places.append(Place(drawn.epoch, int(drawn.shards[at]), int(drawn.rows[at])))
        return places

    def due(self, lane: int, turn: int) -> tuple[tuple[int, ...], int]:
        """Shards that should be at hand when a lane has drawn `turn` times, and until which turn.

        Those of its window, and of the next window a share that grows as this one is used up: so
        shards are asked for at the pace at which they are consumed.
        """
        epoch, drawn = self._where(lane, turn)
        windows = self._lane(epoch, lane)
        number = _window_at(windows, drawn)
        now, following = windows[number], windows[number + 1 : number + 2]
        while not following:  # the next epoch's, or the one after where that has nothing here
            epoch += 1
            following = self._lane(epoch, lane)[:1]
        after, size, done = following[0].shards, now.high - now.low, drawn - now.begin
        ahead = min(len(after), done * len(after) // size + 1)
        until = size if ahead == len(after) else -(-ahead * size // len(after))
        return (*now.shards, *after[:ahead]), turn + until - done

    def _where(self, lane: int, turn: int) -> tuple[int, int]:
        """Epoch of a lane's draw number `turn`, and how many the lane drew of it before."""
        epoch = (turn * self.lanes + lane) // self.num_samples
        return epoch, turn - self._turns(epoch, lane)

    def _turns(self, epoch: int, lane: int) -> int:
        """Draws of a lane before an epoch begins: numbers below e N that are = lane mod C."""
        return -(-max(0, epoch * self.num_samples - lane) // self.lanes)

    def _lay_out(self, epoch: int) -> Line:
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self._sizes))
        return Line(shards, self._sizes[shards].cumsum())

    def _cut(self, epoch: int, lane: int) -> tuple[Window, ...]:
        """Windows of a lane in the order it reads them; none if the epoch has nothing for it."""
        counts = [
            self._turns(epoch + 1, each) - self._turns(epoch, each) for each in range(lane + 1)
        ]
        low = sum(counts[:-1])
        high = low + counts[-1]
        if low == high:
            return ()
        line = self._line(epoch)
        first, last = np.searchsorted(line.ends, (low, high - 1), side="right")
        order = range(first, last + 1)
        forward = lane % 2 == 0
        if not forward:
            order = order[::-1]
        windows, begin, at = [], 0, 0
        size = 1 + lane // 2 % self.window  # staggered, so not all lanes change at once
        while at < len(order):
            pieces = order[at : at + size]
            left, right = min(pieces), max(pieces)
            start = max(low, int(line.ends[left - 1]) if left else 0)
            end = min(high, int(line.ends[right]))
            windows.append(Window(begin, start, end, tuple(line.shards[list(pieces)].tolist())))
            begin, at, size = begin + end - start, at + size, self.window
        return tuple(windows)

    def _mix(self, lane: int, turn: int) -> Drawn:
        epoch, drawn = self._where(lane, turn)
        windows, line = self._lane(epoch, lane), self._line(epoch)
        number = _window_at(windows, drawn)
        window = windows[number]
        rng = np.random.default_rng((self.seed, epoch, lane, number))
        points = rng.permutation(np.arange(window.low, window.high))
        at = np.searchsorted(line.ends, points, side="right")
        shards = line.shards[at]
        begin = turn - (drawn - window.begin)
        rows = points - line.ends[at] + self._sizes[shards]
        return Drawn(begin, begin + len(points), epoch, shards, rows)


def _window_at(windows: Sequence[Window], drawn: int) -> int:
    """Index of the window that a lane is in after so many draws of an epoch."""
    return bisect_right(windows, drawn, key=lambda window: window.begin) - 1
