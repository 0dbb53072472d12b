"""Turn SIGTERM, SIGINT and SIGUSR1 into a flag that the training loop reads between two steps."""

import signal
from types import FrameType


class StopSignal:
    """A flag raised by the first stop signal; a second SIGINT ends the process at once.

    Schedulers send SIGTERM (Kubernetes, `scancel`) or SIGUSR1 (`sbatch --signal=B:USR1@…`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0

    def install(self) -> "StopSignal":
        """Handle the stop signals in this process (main thread only) and return self."""
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __bool__(self) -> bool:
        return self.received != 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.received = number
