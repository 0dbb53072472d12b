"""Large files with many pictures in them: read in place, or from a nameless local copy."""

import os
import shutil
import tempfile
import threading
from collections import OrderedDict

from data_tools.storage import LocalStore, SourceStore
from dpal.base.errors import DataError, StorageError

PIECE = 2**25


class OpenFile:
    """A file on disk, read at any place by many threads; closed when nobody holds it."""

    def __init__(self, descriptor: int, where: str) -> None:
        self.size = os.fstat(descriptor).st_size
        self._descriptor, self._where = descriptor, where

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def path(self) -> str:
        """A path that opens the same file for a library, whether or not it still has a name."""
        return f"/proc/self/fd/{self._descriptor}"

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`. Raises DataError when the file ends before."""
        data = os.pread(self._descriptor, length, start)
        if len(data) != length:
            raise DataError(f"{self._where!r} ends before byte {start + length}: it is truncated")
        return data


class WholeFiles:
    """The files of a store as files on disk; copies of remote ones, the last `kept` of them.

    A copy is unlinked as soon as it is open: no file is left behind, however the process ends.
    """

    def __init__(self, store: SourceStore, kept: int = 2) -> None:
        self._store, self._kept = store, kept
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def held(self, name: str) -> OpenFile | None:
        """The file `name` if it is local or still there as a copy."""
        if isinstance(self._store, LocalStore):
            return self.open(name)
        with self._lock:
            return self._files.get(name)

    def open(self, name: str) -> OpenFile:
        """The file `name`; threads that ask meanwhile wait for the one copy.

        Raises:
            DataError: when it does not exist.
            StorageError: when it cannot be read, or the temporary folder has no room for it.
        """
        with self._lock:
            if name not in self._files:
                self._files[name] = open_whole(self._store, name)
                while len(self._files) > self._kept:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return self._files[name]


def open_whole(store: SourceStore, name: str) -> OpenFile:
    """The stored file `name` on disk: itself, or a verified copy in the temporary folder."""
    where = f"{store.url}/{name}"
    if isinstance(store, LocalStore):
        try:
            return OpenFile(os.open(store.path(name), os.O_RDONLY), where)
        except FileNotFoundError:
            raise DataError(f"object {where!r} does not exist") from None
        except OSError as error:
            raise StorageError(f"cannot read {where!r}: {error.strerror}") from None
    size = store.size(name)
    folder = tempfile.gettempdir()
    if size > shutil.disk_usage(folder).free:
        raise StorageError(
            f"cannot copy {where!r}, {size} bytes, to {folder!r}: no space left there; TMPDIR "
            "names another folder"
        )
    try:
        with tempfile.TemporaryFile() as copy:
            for start in range(0, size, PIECE):
                # A range is whole or an error, so the copy has the object's length.
                copy.write(store.get_range(name, start, min(PIECE, size - start)))
            copy.flush()
            return OpenFile(os.dup(copy.fileno()), where)
    except OSError as error:
        raise StorageError(f"cannot copy {where!r} to {folder!r}: {error.strerror}") from None
