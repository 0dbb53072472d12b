"""A progress bar with an ETA on a terminal; a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Count `total` units of `what`; use as a context manager and call `advance`.

    Args:
        what: verb and noun shown in front ("cache", "train").
        total: number of units.
        unit: name of one unit ("shard", "step").
        initial: units that were done before this process started.
        silent: show nothing, in a process whose like is shown already (any rank but 0).
    """

    PLAIN_SECONDS = 10.0

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, initial
        self._initial, self._clock = initial, clock
        self._stream = stream or sys.stderr
        self._start = self._last_line = clock()
        self._bar, self._silent = None, silent
        if self._stream.isatty() and not silent:
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=what,
                unit=unit,
                file=self._stream,
                dynamic_ncols=True,
                leave=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._last_line != self._start or self.done != self._initial:
            self._line("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` is shown behind the rate."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._clock() - self._last_line >= self.PLAIN_SECONDS:
            self._line(note)

    def _line(self, note: str) -> None:
        self._last_line = self._clock()
        if self._silent:
            return
        elapsed = max(self._last_line - self._start, 1e-9)
        rate = (self.done - self._initial) / elapsed
        eta = f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else "no estimate yet"
        tail = f"  {note}" if note else ""
        print(
            f"{self.what}: {self.done}/{self.total} {self.unit}s  "
            f"{rate:.2f} {self.unit}s/s  {eta}{tail}",
            file=self._stream,
            flush=True,
        )
