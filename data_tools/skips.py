"""The error budget: damaged samples are counted, listed and bounded, never dropped in silence."""

import json
import threading
from pathlib import Path

from data_tools.order import Place
from data_tools.sample import SampleError
from dpal.base.errors import DataError, StorageError
from dpal.base.telemetry import DATA_SKIPPED, Telemetry


class SkipList:
    """Damaged samples that one process has skipped.

    Args:
        budget: so many different samples may be skipped; one more stops the run.
        path: JSON lines, one for every skip: epoch, shard, row, key, reason, and the key of the
            sample that stands in for it (if that is damaged too, it has a line of its own). Several
            processes may append to it. None writes nothing.
        telemetry: told of every skip.
    """

    def __init__(
        self, budget: int, path: Path | None = None, telemetry: Telemetry | None = None
    ) -> None:
        self.budget, self._path, self._telemetry = budget, path, telemetry
        self._seen: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def add(self, place: Place, shard: str, key: str, error: SampleError, *, stand_in: str) -> None:
        """Note a skip.

        Raises:
            DataError: when the budget is used up.
            StorageError: when the list cannot be written.
        """
        with self._lock:
            self._seen.add((place.shard, place.row))
            used = len(self._seen)
            row = {"epoch": place.epoch, "shard": shard, "row": place.row, "key": key}
            self._write({**row, "reason": str(error), "stand_in": stand_in})
        if used > self.budget:
            listed = f"; all are listed in {str(self._path)!r}" if self._path is not None else ""
            raise DataError(
                f"sample {key!r} of shard {shard!r} is damaged ({error}); {used} damaged samples "
                f"are more than the {self.budget} that data.max_skip_fraction allows here{listed}"
            )
        if self._telemetry is not None:
            self._telemetry.report(DATA_SKIPPED, 1, reason="damaged")

    def _write(self, row: dict[str, object]) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {str(self._path)!r}: {error.strerror}") from None
