"""Object stores: one small set of operations over a local folder or any fsspec URL.

`open_store` is the only way in. Names are relative to the store's URL, with `/` between parts.
"""

import errno
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from data_tools.verified import Buffer as Buffer
from data_tools.verified import Verified
from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.base.inputs import Storage
from dpal.base.telemetry import Telemetry

TEMPORARY = ".dpal-tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ObjectStore(Protocol):
    """Named objects under `url`; an object is either whole or not there.

    Raises:
        DataError: from `get`, `get_range` and `size` when the object does not exist.
        StorageError: when the store refuses, cannot be reached after retries, or is full.
    """

    url: str

    def get(self, name: str) -> bytes: ...

    def get_range(self, name: str, start: int, length: int) -> bytes: ...

    def put(self, name: str, data: Buffer) -> None: ...

    def put_if_absent(self, name: str, data: bytes) -> bool: ...

    def exists(self, name: str) -> bool: ...

    def size(self, name: str) -> int: ...

    def list(self, prefix: str = "") -> list[str]: ...

    def delete(self, name: str) -> None: ...


class Listed(NamedTuple):
    """One object as a listing shows it.

    Attributes:
        name: relative to the store's URL.
        size: bytes; -1 for what is not a regular file (a pipe, a socket, a dead link).
        version: changes when the object's bytes change (time of change, or ETag).
    """

    name: str
    size: int
    version: str


class SourceStore(ObjectStore, Protocol):
    """An object store whose listing tells sizes and versions, as ingest needs them."""

    def listing(self) -> tuple[Listed, ...]: ...


def open_store(url: str, storage: Storage, *, telemetry: Telemetry | None = None) -> SourceStore:
    """The store at `url`: a local path, `file://`, `s3://bucket/prefix`, or any fsspec scheme.

    Raises:
        ConfigError: for a URL that carries credentials or names a scheme that is not installed.
    """
    if not url:
        raise ConfigError("storage url '' is empty: accepted are a local path or a URL")
    parts = urlsplit(url)
    if "://" in url and "@" in parts.netloc:
        raise ConfigError(
            f"storage url {parts.scheme}://…@{parts.hostname} carries credentials: accepted are "
            "the standard AWS variables or the recipe's storage section"
        )
    local = local_path(url)
    if local is not None:
        return LocalStore(local)
    from data_tools.remote import RemoteStore  # only now: it imports fsspec

    return RemoteStore(url, storage, telemetry=telemetry)


def local_path(url: str) -> Path | None:
    """The path that a URL without a scheme, or of `file://`, means; None for all others."""
    if "://" not in url:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.netloc + parts.path)) if parts.scheme == "file" else None


def is_remote(url: str) -> bool:
    """Whether bytes at `url` come over a network."""
    return local_path(url) is None


def check_name(name: str, url: str) -> str:
    """Return `name` if it stays below the store's URL. Raises DataError otherwise."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"object name {name!r} in {url} is not a plain relative name")
    return name


class LocalStore:
    """A folder as an object store; every write is to a hidden file that is renamed at the end.

    Attributes:
        verified: the files whose checksum this process has compared.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self.verified = Verified()

    def path(self, name: str) -> Path:
        """Where object `name` lies on disk."""
        return self.root / check_name(name, self.url)

    def get(self, name: str) -> bytes:
        """All bytes of `name`."""
        with self._errors("read", name):
            return self.path(name).read_bytes()

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of `name` from `start`; DataError if it is shorter."""
        with self._errors("read", name), self.path(name).open("rb") as file:
            file.seek(start)
            data = file.read(length)
        return require_length(data, length, start, f"{self.url}/{name}")

    def put(self, name: str, data: Buffer) -> None:
        """Write `name`, replacing what was there; readers see the old or the new object."""
        with self._errors("write", name), self._aside(name, data) as temporary:
            os.replace(temporary, self.path(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; True for the one writer that wrote it."""
        if self.exists(name):
            return False
        with self._errors("write", name), self._aside(name, data) as temporary:
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                return False
        return True

    def exists(self, name: str) -> bool:
        """Whether `name` is an object (a folder is not)."""
        with self._errors("read", name):
            return self.path(name).is_file()

    def size(self, name: str) -> int:
        """Number of bytes of `name`."""
        with self._errors("read", name):
            return self.path(name).stat().st_size

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of all objects that start with `prefix`; empty if there is no folder."""
        top = self.root / check_name(prefix, self.url).rpartition("/")[0] if prefix else self.root
        names: list[str] = []
        with self._errors("list", prefix):
            for folder, _folders, files in os.walk(top, onerror=_raise_unless_missing):
                relative = Path(folder).relative_to(self.root)
                names += [(relative / file).as_posix() for file in files]
        return sorted(n for n in names if n.startswith(prefix) and not is_temporary(n))

    def listing(self) -> tuple[Listed, ...]:
        """Everything below the folder, links followed, sorted by name. DataError if no folder."""
        if not self.root.is_dir():
            kind = "is not a folder" if self.root.exists() else "does not exist"
            raise DataError(f"folder {self.url!r} {kind}")
        found: list[Listed] = []
        with self._errors("list", ""):
            for path in _walk(self.root, set()):
                name = path.relative_to(self.root).as_posix()
                try:
                    status = path.stat()
                except OSError:  # a dead link, or a file that has just gone
                    found.append(Listed(name, -1, ""))
                    continue
                size = status.st_size if stat.S_ISREG(status.st_mode) else -1
                found.append(Listed(name, size, str(status.st_mtime_ns)))
        return tuple(sorted(entry for entry in found if not is_temporary(entry.name)))

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens if it is not there."""
        with self._errors("delete", name):
            self.path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove hidden files that killed processes of this machine left behind."""
        mark = f"{TEMPORARY}-{socket.gethostname()}-"
        with self._errors("list", ""):
            for folder, _folders, files in os.walk(self.root, onerror=_raise_unless_missing):
                for file in files:
                    owner = file.partition(mark)[2].partition("-")[0]
                    if is_temporary(file) and owner.isdigit() and not is_alive(int(owner)):
                        Path(folder, file).unlink(missing_ok=True)

    @contextmanager
    def _aside(self, name: str, data: Buffer) -> Iterator[Path]:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary = path.with_name(f".{path.name[:100]}{TEMPORARY}-{owner}")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        where = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError:
            raise DataError(f"object {where!r} does not exist") from None
        except OSError as error:
            if error.errno in _FULL:
                raise StorageError(
                    f"cannot {verb} {where!r}: no space left ({error.strerror})"
                ) from None
            raise StorageError(f"cannot {verb} {where!r}: {error.strerror or error}") from None


def require_length(data: bytes, length: int, start: int, where: str) -> bytes:
    """Return `data` if it has `length` bytes. Raises DataError otherwise."""
    if len(data) != length:
        raise DataError(
            f"object {where!r} ends before byte {start + length}: it is truncated or not the "
            "object it is taken for"
        )
    return data


def is_temporary(name: str) -> bool:
    """Whether `name` is a write in progress, never an object."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and TEMPORARY in last


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Every non-folder below `folder`; each real folder once, so linked loops end."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, visited)
        else:
            yield path


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs under that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
