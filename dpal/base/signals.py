"""Turn SIGTERM, SIGINT and SIGUSR1 into a flag that the training loop reads between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """A flag raised by the first stop signal; a second SIGINT ends the process at once.

    Schedulers send SIGTERM (Kubernetes, `scancel`) or SIGUSR1 (`sbatch --signal=B:USR1@…`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator["StopSignal"]:
        """Handle the stop signals inside a `with` block; the former handlers return after it.

        Outside the main thread no signal can be handled; the flag then never rises.
        """
        stop = cls()
        if threading.current_thread() is not threading.main_thread():
            yield stop
            return
        before = {number: signal.getsignal(number) for number in cls.SIGNALS}
        for number in cls.SIGNALS:
            signal.signal(number, stop._handle)
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received != 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number
