"""Timing that survives a busy machine: interleaved rounds, medians, and ratios within a round.

Absolute figures move by tens of per cent when other programs run; two pieces of work that take
turns in one process suffer alike, so what a benchmark reports first is their ratio. On a CPU the
clock counts this process's CPU seconds, which waiting for a core does not lengthen.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Clock = Callable[[], float]
cpu_seconds: Clock = time.process_time
wall_seconds: Clock = time.perf_counter


class Timing(NamedTuple):
    """Seconds of one piece of work, by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of all rounds."""
        return statistics.median(self.seconds)

    def over(self, other: "Timing") -> float:
        """Median over rounds of this time / the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def interleave(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Clock = cpu_seconds,
) -> dict[str, Timing]:
    """Time pieces of work in turns: a, b, c, a, b, c, ...

    Args:
        rounds: turns that count.
        warm_up: turns before that, which do not.

    Raises:
        ValueError: without a round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1 is needed")
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warm_up + rounds):
        for name, run in work.items():
            begin = clock()
            run()
            spent = clock() - begin
            if turn >= warm_up:
                seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a head, columns aligned; numbers to three significant digits."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
