"""Which bytes are known to be the right ones: hashed once for each process, not at every open.

A checksum over a whole shard costs about half a millisecond a megabyte. The bytes of a file are
hashed when this process first opens it, and again only when the file has become another one
(other inode, size or time of change).
"""

import hashlib
import mmap
import os
from collections.abc import Callable
from typing import NamedTuple

from dpal.base.errors import DataError
from dpal.base.telemetry import STORAGE_REFETCHES, Telemetry

Buffer = bytes | mmap.mmap


class Content(NamedTuple):
    """The bytes an object must have: sha256 in hexadecimal digits, and their number."""

    sha256: str
    num_bytes: int

    @staticmethod
    def of(data: Buffer) -> "Content":
        """What describes `data`."""
        return Content(hashlib.sha256(data).hexdigest(), len(data))

    def matches(self, data: Buffer) -> bool:
        """Whether `data` are those bytes."""
        return len(data) == self.num_bytes and Content.of(data) == self


class Verified:
    """The files that this process has hashed; may be shared by threads."""

    def __init__(self) -> None:
        self._seen: set[tuple[Content, int, int, int]] = set()

    def check(self, data: Buffer, status: os.stat_result, content: Content) -> bool:
        """Whether an open file holds `content`: hashed at the first call, then by its status."""
        if len(data) != content.num_bytes:
            return False
        mark = _mark(status, content)
        if mark not in self._seen:
            if not content.matches(data):
                return False
            self._seen.add(mark)
        return True

    def trust(self, status: os.stat_result, content: Content) -> None:
        """Remember a file that was just written from verified bytes."""
        self._seen.add(_mark(status, content))


def fetch_verified(
    fetch: Callable[[], bytes],
    content: Content,
    damaged: DataError,
    telemetry: Telemetry | None = None,
) -> bytes:
    """What `fetch` brings, asked for a second time when the bytes are not `content`.

    The second answer tells damage on the way, which is counted, from damage in the store.

    Raises:
        DataError: `damaged`, when the second answer is wrong too.
    """
    data = fetch()
    if content.matches(data):
        return data
    data = fetch()
    if not content.matches(data):
        raise damaged
    if telemetry is not None:
        telemetry.report(STORAGE_REFETCHES, 1)
    return data


def _mark(status: os.stat_result, content: Content) -> tuple[Content, int, int, int]:
    return content, status.st_dev, status.st_ino, status.st_mtime_ns
