"""What a folder or prefix holds, in a file on disk, so that its size costs no memory.

Sorting and looking up are left to SQLite: `sqlite3.connect("")` is a nameless temporary file
that is gone with the process, with a page cache of a fixed size.
"""

import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.storage import Listed, LocalStore, SourceStore, is_temporary
from dpal.base.errors import DataError, StorageError

IMAGE_NAMES = (".jpg", ".jpeg", ".png")
TAR_NAME = ".tar"


@contextmanager
def scratch(*statements: str) -> Iterator[sqlite3.Connection]:
    """A database in a temporary file of its own, after running `statements`; closed at the end.

    Raises:
        StorageError: when the temporary folder is full.
    """
    database = open_scratch(*statements)
    try:
        with _errors():
            yield database
    finally:
        database.close()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(f"cannot sort in the temporary folder (TMPDIR): {error}") from None


def open_scratch(*statements: str) -> sqlite3.Connection:
    """An empty database in a temporary file of its own, after running `statements`."""
    database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-16000"):
        database.execute(f"PRAGMA {pragma}")
    for statement in statements:
        database.execute(statement)
    return database


def to_key(name: str) -> bytes:
    """A name as SQLite sorts it: bytes, in the order of the text."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no file can be called so
        return name.encode("utf-8", "replace")


def to_name(key: bytes) -> str:
    """The name that `to_key` made the key of."""
    return key.decode("utf-8", "surrogateescape")


class Catalogue:
    """All files below a store's URL, listed once, at the first question.

    Raises:
        DataError: when the folder is missing.
        StorageError: when it cannot be listed, or the temporary folder is full.
    """

    def __init__(self, store: SourceStore) -> None:
        self.num_files = self.num_images = self.num_tars = 0
        self._files = open_scratch(
            "CREATE TABLE files (name BLOB, base BLOB, size INT, version TEXT)"
        )
        with _errors():
            self._files.execute("BEGIN")
            self._files.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", self._rows(store))
            self._files.execute("COMMIT")
        self._indexed = False

    def entries(self, ending: str = "") -> Iterator[Listed]:
        """All files whose names end so, sorted by name."""
        with _errors():
            for name, size, version in self._files.execute(
                "SELECT name, size, version FROM files ORDER BY name"
            ):
                if (known := to_name(name)).lower().endswith(ending):
                    yield Listed(known, size, version)

    def find(self, name: str) -> Listed | None:
        """The file of exactly that name."""
        return self._only("name", to_key(name))

    def find_base(self, name: str) -> Listed | None:
        """The only file whose last part is the last part of `name`; None if several have it."""
        return self._only("base", to_key(name.rpartition("/")[2]))

    def _only(self, column: str, key: bytes) -> Listed | None:
        if not self._indexed:
            with _errors():
                self._files.execute("CREATE INDEX by_name ON files (name)")
                self._files.execute("CREATE INDEX by_base ON files (base)")
            self._indexed = True
        rows = self._files.execute(
            f"SELECT name, size, version FROM files WHERE {column} = ? LIMIT 2", (key,)
        ).fetchall()
        if len(rows) != 1:
            return None
        name, size, version = rows[0]
        return Listed(to_name(name), size, version)

    def _rows(self, store: SourceStore) -> Iterator[tuple[bytes, bytes, int, str]]:
        for name, size, version in _listed(store):
            self.num_files += 1
            self.num_images += name.lower().endswith(IMAGE_NAMES)
            self.num_tars += name.lower().endswith(TAR_NAME)
            yield to_key(name), to_key(name.rpartition("/")[2]), size, version


def _listed(store: SourceStore) -> Iterable[Listed]:
    """As `store.listing()`, but without a list of all files in memory."""
    if not isinstance(store, LocalStore):
        from data_tools.remote import RemoteStore  # only now: it imports fsspec
        from data_tools.sources.s3_pages import listed_by_pages

        return listed_by_pages(store) if isinstance(store, RemoteStore) else store.listing()
    if not store.root.is_dir():
        kind = "is not a folder" if store.root.exists() else "does not exist"
        raise DataError(f"folder {store.url!r} {kind}")
    return _walked(store.root, store.url)


def _walked(root: Path, url: str) -> Iterator[Listed]:
    try:
        for path in _files_below(str(root), set()):
            name = os.path.relpath(path, root)
            if not is_temporary(name):
                yield stat_of(path, name)
    except OSError as error:
        raise StorageError(f"cannot list {url!r}: {error.strerror}") from None


def _files_below(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Every non-folder, links followed; each real folder once, so that linked loops end."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    folders = []
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir():
                folders.append(entry.path)
            else:
                yield entry.path
    for below in sorted(folders):
        yield from _files_below(below, visited)


def stat_of(path: str, name: str) -> Listed:
    """One local file as a listing shows it; size -1 for a dead link or no regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return Listed(name, -1, "")
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Listed(name, size, str(status.st_mtime_ns))
