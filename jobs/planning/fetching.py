"""What a training run fetches from a store: bytes and requests, with local copies on every node.

Legend: N images, G shards, K and K' pinned base views and composites, E epochs, W devices, n nodes.
"""

import math
from collections.abc import Iterator

from jobs.planning.types import Workload


def remote_bytes(work: Workload, *, online: bool) -> float:
    """What one epoch needs from the store: whole shards, and every series of their targets.

    A loader fetches all K + K' tars of a shard, as its samples may show any of their views.
    """
    targets = 0 if online or not work.remote_targets else work.target_bytes
    return targets + (work.shard_bytes if work.remote_shards else 0.0)


def fetched_epochs(share: float, nodes: int, epochs: float) -> float:
    """Epochs' worth of shards that all nodes together fetch in the first E epochs.

    Args:
        share: what one node keeps of what all read, c.

    Every epoch permutes the shards and hands each to any of the n nodes, so a node comes back to a
    shard after j epochs with probability (1/n) (1 - 1/n)^(j-1). Meanwhile it has read
    1 - (1 - u/n) (1 - 1/n)^(j-1) (1 - v/n) of all shards, where u and v are uniform: how far the
    shard stood from the end of one epoch and from the beginning of the other. The least recently
    used go first, so it is still there if that is below c.
    """
    whole = math.floor(epochs)
    low = whole - _found(share, nodes, whole)
    high = whole + 1 - _found(share, nodes, whole + 1)
    return low + (epochs - whole) * (high - low)


def hit_share(copies: float, total: float, nodes: int = 1, epochs: float = 2.0) -> float:
    """Share of what is read in epochs after the first that lies among a node's local copies.

    On one node it is c + (1 - c) ln(1 - c), c = copies / total, in all of them.
    """
    if total <= 0:
        return 1.0
    later = max(1.0, epochs - 1)
    return 1 - (fetched_epochs(copies / total, nodes, 1 + later) - 1) / later


def fetched_bytes(work: Workload, nodes: int, epochs: float, *, online: bool) -> float:
    """What one run fetches in its first epochs.

    Where a cut between two nodes goes through a shard, both fetch it.
    """
    total = remote_bytes(work, online=online)
    return total * _fetched(work, nodes, epochs, total) * (1 + shared(work, nodes))


def num_gets(work: Workload, nodes: int, epochs: float, *, online: bool) -> float:
    """Read requests of one run's first epochs: a shard's tar, its targets' tars and a row.

    A ledger row is read whether the tars are among the local copies or not, at most once in an
    epoch for each teacher.
    """
    fetched = _fetched(work, nodes, epochs, remote_bytes(work, online=online))
    per_shard = fetched if work.remote_shards else 0.0
    if work.remote_targets and not online:
        per_shard += work.num_series * fetched + len(work.teachers) * epochs
    return work.shards * per_shard * (1 + shared(work, nodes))


def shared(work: Workload, nodes: int) -> float:
    """Shards that two nodes read, over all shards."""
    return min(nodes - 1, work.shards) / work.shards


def stretches(epochs: float) -> Iterator[tuple[float, float]]:
    """A run's epochs in pieces: the first ones alone, later ones together, as they differ less."""
    begin = 0.0
    while begin < epochs:
        end = min(epochs, begin + max(1.0, begin // 4))
        yield begin, end
        begin = end


def _fetched(work: Workload, nodes: int, epochs: float, total: float) -> float:
    return fetched_epochs(work.copies_bytes / total, nodes, epochs) if total else 0.0


def _found(share: float, nodes: int, epochs: int) -> float:
    """In how many of E epochs a shard is found among the copies of the node that reads it."""
    if share <= 0 or epochs < 2:
        return 0.0
    rest, others = 1 - share, 1 - 1 / nodes  # what a node does not keep; what it does not read
    longest = epochs - 1
    if rest > 0 and nodes > 1:  # so long ago, it is there wherever in their epochs both stood
        longest = min(longest, max(0, math.floor(math.log(rest) / math.log(others) - 1)))
    elif rest > 0:
        longest = 0
    left = others**longest
    found = (epochs - nodes) * (1 - left) + longest * left  # sum of (E - j) (1/n) (1 - 1/n)^(j-1)
    for j in range(longest + 1, epochs):
        weight = others ** (j - 1)
        if weight <= rest:
            break
        found += (epochs - j) * weight / nodes * _likely(rest / weight, nodes)
    return max(0.0, found)  # what is left of two large numbers, on very many nodes


def _likely(bound: float, nodes: int) -> float:
    """Probability that (1 - u/n) (1 - v/n) is above a bound below 1, for uniform u and v."""
    least = 1 - 1 / nodes
    if bound <= least**2:
        return 1.0
    if bound >= least:
        return nodes**2 * (1 - bound + bound * math.log(bound))
    return 1 - nodes**2 * (bound * math.log(bound / least**2) - bound + least**2)
