"""A progress bar with an ETA on a terminal; elsewhere a plain line now and then, if it is news."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line on stderr, above the bar where there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


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
        self._note, self._told = "", (initial, "")
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
        elif self._told != (self.done, self._note):
            self._line()

    def prepare(self, note: str) -> None:
        """Tell at once what has to be done before the first unit is begun."""
        self._note, self._told = note, (self.done, note)
        if self._bar is not None:
            self._bar.set_postfix_str(note)
        elif not self._silent:
            print(f"{self.what}: {note}", file=self._stream, flush=True)

    def begin(self) -> None:
        """Count seconds from now: the rate and the estimate are of units, not of preparation."""
        self._start = self._last_line = self._clock()
        self._note, self._told = "", (self.done, "")
        if self._bar is not None:
            self._bar.unpause()
            self._bar.set_postfix_str("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` is shown behind the rate."""
        self.done += count
        news, self._note = note != self._note, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=news and not count)
            self._bar.update(count)
        elif self._told == (self.done, note):
            return  # the same line again would tell nothing
        elif self._clock() - self._last_line >= self.PLAIN_SECONDS:
            self._line()

    def _line(self) -> None:
        self._last_line, self._told = self._clock(), (self.done, self._note)
        if self._silent:
            return
        elapsed = max(self._last_line - self._start, 1e-9)
        new = self.done - self._initial
        words = [f"{self.what}: {self.done}/{self.total} {self.unit}s"]
        if new:
            words.append(f"{new / elapsed:.2f} {self.unit}s/s")
        if self.done >= self.total:
            words.append(f"in {elapsed:.0f} s")
        else:
            seconds = (self.total - self.done) * elapsed / new if new else 0.0
            words.append(f"{seconds:.0f} s left" if new else "no estimate yet")
        words += [self._note] if self._note else []
        print("  ".join(words), file=self._stream, flush=True)
