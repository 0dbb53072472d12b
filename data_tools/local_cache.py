"""Local copies of remote objects: verified, shared by all processes of a node, bounded in size.

    <folder>/<sha256>.tar     a whole copy; its time of access tells how recently it was used
    <folder>/.<sha256>…       a copy being written; its writer holds a lock on it
    <folder>/locks/<xyz>      who fetches the objects whose checksum starts with these digits
    <folder>/locks/bytes      the bytes of all copies; locked by whoever publishes or evicts

Every lock is the kernel's (`flock`): the lock of a process that was killed is free at once, and
no process number is ever trusted. Locks only save work: whoever waits too long for another's
download makes its own, and copies are published by renaming.

A copy may be evicted while a process still reads it: it stays mapped there, and its disk space
is free when the last reader lets go. So the disk holds at most the budget, the copies that are
being written, and the evicted ones that are still open.
"""

import errno
import fcntl
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_tools.storage import TEMPORARY
from data_tools.verified import Buffer, Content, Verified
from dpal.base.errors import StorageError
from dpal.base.inputs import Storage

SPARE = 0.125  # of the budget is free after an eviction, so that few publishers list the folder
PATIENCE_S = 60.0
_POLL_S = 0.02
_FULL = {errno.ENOSPC, errno.EDQUOT}


def open_local_cache(storage: Storage) -> "LocalCache | None":
    """The copies that a recipe's `storage` section asks for; None when it asks for none."""
    if storage.copies_gb == 0:
        return None
    return LocalCache(Path(storage.copies), int(storage.copies_gb * 1e9))


class Copy(NamedTuple):
    """One copy on disk: when it was last used (nanoseconds), its size, and where it lies."""

    used: int
    num_bytes: int
    path: Path


class LocalCache:
    """Verified local copies of remote objects, the least recently used evicted first.

    Args:
        folder: on a disk of this node; any number of processes and runs may share it.
        max_bytes: of all copies together; an object larger than that is kept in memory alone.
        patience_s: how long to wait for another process that fetches the same object.
    """

    def __init__(self, folder: Path, max_bytes: int, *, patience_s: float = PATIENCE_S) -> None:
        self.folder, self.max_bytes, self._patience_s = folder, max_bytes, patience_s
        self._locks = folder / "locks"
        self._verified = Verified()
        self._swept = False

    def get(self, sha256: str, num_bytes: int, fetch: Callable[[], bytes]) -> Buffer:
        """The bytes of an object, from its copy if there is one that is whole.

        Args:
            sha256: checksum of the object, in hexadecimal digits.
            fetch: brings the object, verified; called by one process of a node at a time.

        Raises:
            StorageError: when the folder cannot be written or its disk is full.
        """
        content = Content(sha256, num_bytes)
        if num_bytes > self.max_bytes or num_bytes == 0:  # an empty file cannot be mapped
            return fetch()
        with self._errors():
            self._prepare()
            copy = self._open(content)
        if copy is not None:
            return copy
        with self._fetching(content):
            with self._errors():
                copy = self._open(content)  # another process may have been faster
            return copy if copy is not None else self._keep(content, fetch())

    def path(self, sha256: str) -> Path:
        """Where the copy of an object lies, if there is one."""
        return self.folder / f"{sha256}.tar"

    def copies(self) -> list[Copy]:
        """Every published copy, the least recently used first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".tar") and not entry.name.startswith("."):
                    with suppress(FileNotFoundError):  # evicted between the two calls
                        status = entry.stat()
                        found.append(Copy(status.st_atime_ns, status.st_size, Path(entry.path)))
        return sorted(found)

    def _prepare(self) -> None:
        """Make the folder, and remove what killed writers left, once for each process."""
        self._locks.mkdir(parents=True, exist_ok=True)
        if self._swept:
            return
        for path in self.folder.glob(f".*{TEMPORARY}-*"):
            with suppress(FileNotFoundError), path.open("rb") as file:
                if _try_lock(file.fileno()):  # free: its writer is gone
                    path.unlink()
        self._swept = True

    def _open(self, content: Content) -> mmap.mmap | None:
        """The mapped copy, marked as just used; None when there is none that is whole."""
        path = self.path(content.sha256)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size == content.num_bytes:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    if self._verified.check(data, status, content):
                        with suppress(OSError):  # another user's copy: read, but not ours to mark
                            os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))
                        return data
        except FileNotFoundError:
            return None
        path.unlink(missing_ok=True)  # damaged on this disk
        return None

    @contextmanager
    def _fetching(self, content: Content) -> Iterator[None]:
        """Hold the right to fetch: until the copy is there, or patience is over, others wait."""
        with self._errors():
            lock = os.open(self._locks / content.sha256[:3], os.O_RDWR | os.O_CREAT, 0o666)
        try:
            deadline = time.monotonic() + self._patience_s
            path = self.path(content.sha256)
            while not _try_lock(lock) and not path.exists() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(lock)

    def _keep(self, content: Content, data: bytes) -> Buffer:
        """Publish a copy of verified bytes and map it; the bytes themselves if it is gone again."""
        with self._errors():
            try:
                self._publish(content, data)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                with self._accounts() as published:  # something else fills the disk: give way
                    self._evict(published - 4 * content.num_bytes)
                self._publish(content, data)
            copy = self._open(content)
        return copy if copy is not None else data

    def _publish(self, content: Content, data: bytes) -> None:
        path = self.path(content.sha256)
        aside = self.folder / f".{content.sha256}{TEMPORARY}-{secrets.token_hex(6)}"
        try:
            with aside.open("xb") as file:
                _try_lock(file.fileno())
                file.write(data)
                file.flush()
                status = os.fstat(file.fileno())
                # Not synced to disk: what a power failure damages, the next process refuses.
                with self._accounts() as published:
                    if path.exists():  # replaced, not added
                        published -= content.num_bytes
                    if published + content.num_bytes > self.max_bytes:
                        spare = max(content.num_bytes, int(self.max_bytes * SPARE))
                        published = self._evict(self.max_bytes - spare)
                    self._note(published + content.num_bytes)  # before: never too little
                    with suppress(FileNotFoundError):  # swept before it was locked
                        os.replace(aside, path)
            self._verified.trust(status, content)
        finally:
            aside.unlink(missing_ok=True)

    @contextmanager
    def _accounts(self) -> Iterator[int]:
        """Alone among all processes, the bytes of all copies."""
        with (self._locks / "bytes").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            noted = file.read()
            yield int(noted) if noted.isdigit() else sum(c.num_bytes for c in self.copies())

    def _note(self, published: int) -> None:
        with (self._locks / "bytes").open("wb") as file:  # by whoever holds its lock
            file.write(b"%d" % published)

    def _evict(self, target: int) -> int:
        """Remove the least recently used copies until `target` bytes are left; what is left."""
        copies = self.copies()
        left = sum(copy.num_bytes for copy in copies)
        for copy in copies:
            if left <= max(target, 0):
                break
            copy.path.unlink(missing_ok=True)
            left -= copy.num_bytes
        self._note(left)
        return left

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"cannot keep copies of remote shards in {str(self.folder)!r}"
            reason = "no space left" if error.errno in _FULL else error.strerror or str(error)
            raise StorageError(
                f"{where}: {reason}; set storage.copies to a folder with room, or lower "
                f"storage.copies_gb={self.max_bytes / 1e9:g} (0 keeps shards in memory)"
            ) from None


def _try_lock(fd: int) -> bool:
    """Lock an open file unless another process holds it; where locks do not work, nobody does."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
