"""Samples on local disk from the survey until their shard is written.

For those that were made and those that came over a network. Shards are in the order of keys, so
the persons of one picture come up far apart; without this, the picture would be fetched and decoded
anew for each. It only saves work: what is not here, as after a restart or beyond the limit, is made
again from its picture.
"""

import os
import shutil
import tempfile
import threading
from pathlib import Path

LIMIT = 32 * 2**30  # bytes; and never more than half of what is free


class Spool:
    """Bytes by offset, in a file without a name; many threads may add and read.

    Args:
        limit: bytes it may hold; None: half of what is free in the temporary folder, up to LIMIT.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as this is
        folder = Path(tempfile.gettempdir())
        self._limit = min(LIMIT, shutil.disk_usage(folder).free // 2) if limit is None else limit
        self._end = 0
        self._lock = threading.Lock()
        self._added: list[tuple[str, int]] = []

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def add(self, key: str, contents: bytes) -> None:
        """Keep the bytes of sample `key`, if there is room."""
        with self._lock:
            start = self._end
            if start + len(contents) > self._limit:
                return
            self._end += len(contents)
        try:
            written = os.pwrite(self._file.fileno(), contents, start)
        except OSError:  # the disk is fuller than it was
            self._limit = 0
            return
        if written == len(contents):
            with self._lock:
                self._added.append((key, start))

    def drain(self) -> list[tuple[str, int]]:
        """Keys and offsets of what was added since the last call."""
        with self._lock:
            added, self._added = self._added, []
        return added

    def read(self, offset: int, size: int) -> bytes:
        """What was added at `offset`."""
        return os.pread(self._file.fileno(), size, offset)
