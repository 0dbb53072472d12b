"""Remote object stores through fsspec, with this project's own retries and error sentences."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from data_tools.direct_get import DirectGet, NotServed
from data_tools.failures import code_of, is_conflict, judge_failure, scrub, tell, wait_asked_for
from data_tools.filesystem import check_scheme, open_filesystem, within
from data_tools.storage import Buffer, Listed, check_name, require_length
from dpal.base.errors import DataError, DpalError, StorageError
from dpal.base.inputs import Storage
from dpal.base.telemetry import STORAGE_RETRIES, Telemetry

Result = TypeVar("Result")

FIRST_DELAY_S = 0.4
LONGEST_DELAY_S = 20.0
RETRIES_AT_ONCE = 8


class RemoteStore:
    """An fsspec URL as an object store. Not tied to a process: may be pickled and forked.

    Args:
        url: e.g. `s3://bucket/prefix`.
        storage: endpoint, credentials, retries and timeout.
        sleep: waits between two attempts, in seconds.
    """

    def __init__(
        self,
        url: str,
        storage: Storage,
        *,
        telemetry: Telemetry | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self._storage, self._telemetry, self._sleep = storage, telemetry, sleep
        self._is_s3 = self.url.partition("://")[0] in ("s3", "s3a")
        self._fs: Any = None
        self._inherited: list[Any] = []
        self._pid = 0
        self._direct: DirectGet | None = None
        self._retrying = threading.Semaphore(RETRIES_AT_ONCE)
        check_scheme(self.url)

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, Storage]]:
        return RemoteStore, (self.url, self._storage)

    def get(self, name: str) -> bytes:
        """All bytes of `name`."""
        path = self._path(name)
        return self.call("read", name, lambda fs: self._download(fs, path))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of `name` from `start`; DataError if it is shorter."""
        path = self._path(name)
        if length == 0:
            return b""
        data = self.call("read", name, lambda fs: self._download(fs, path, start, length))
        return require_length(data, length, start, f"{self.url}/{name}")

    def put(self, name: str, data: Buffer) -> None:
        """Write `name`, replacing what was there; readers see the old or the new object."""
        path = self._path(name)
        # A mapped file beyond s3fs' multipart limit is sent in slices, without a whole copy.
        large = self._is_s3 and len(data) >= 2**27
        body = data if large or isinstance(data, bytes) else data[:]
        allowed = self._storage.timeout_s + len(data) / (self._storage.min_mb_per_s * 1e6)

        def attempt(fs: Any) -> None:
            if self._is_s3:
                within(allowed, fs, lambda: fs._pipe_file(path, body))
            else:
                fs.pipe_file(path, body)

        self.call("write", name, attempt)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; True for the one writer that wrote it.

        A write whose answer was lost is recognised by its bytes, so `data` should be unique to
        the writer where exactly one winner matters.
        """
        path, attempts = self._path(name), 0

        def attempt(fs: Any) -> bool:
            nonlocal attempts
            attempts += 1
            try:
                fs.pipe_file(path, data, mode="create")
            except Exception as error:
                if not is_conflict(error):
                    raise
                return attempts > 1 and bytes(fs.cat_file(path)) == data
            return True

        return self.call("write", name, attempt)

    def exists(self, name: str) -> bool:
        """Whether `name` is an object (a prefix of objects is not)."""
        path = self._path(name)

        def attempt(fs: Any) -> bool:
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return False

        return self.call("read", name, attempt)

    def size(self, name: str) -> int:
        """Number of bytes of `name`."""
        path = self._path(name)
        return self.call("read", name, lambda fs: int(fs.info(path)["size"]))

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of all objects that start with `prefix`; empty if there is none."""
        folder = prefix.rpartition("/")[0]
        names = [entry.name for entry in self._find(self._path(folder) if folder else self.url)]
        return [name for name in names if name.startswith(prefix)]

    def listing(self) -> tuple[Listed, ...]:
        """Everything below the URL, sorted by name. Raises DataError if there is nothing."""
        found = self._find(self.url)
        if not found:
            raise DataError(f"folder {self.url!r} does not exist or is empty")
        return found

    def details(self, top: str = "") -> tuple[tuple[str, dict[str, Any]], ...]:
        """Name and what the file system says of every object below the URL, or below `top`."""
        top = top or self.url

        def attempt(fs: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
            root = str(fs._strip_protocol(self.url)).rstrip("/") + "/"
            try:
                found = fs.find(top, detail=True)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return ()
            return tuple(
                (str(path)[len(root) :], info)
                for path, info in found.items()
                if str(path).startswith(root) and info["type"] == "file"
            )

        return self.call("list", top.removeprefix(self.url).lstrip("/"), attempt)

    def _find(self, top: str) -> tuple[Listed, ...]:
        found = self.details(top)
        return tuple(sorted(Listed(name, int(i["size"] or 0), _version(i)) for name, i in found))

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens if it is not there."""
        path = self._path(name)

        def attempt(fs: Any) -> None:
            try:
                fs.rm_file(path)
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise

        self.call("delete", name, attempt)

    def _path(self, name: str) -> str:
        return f"{self.url}/{check_name(name, self.url)}"

    def _filesystem(self) -> Any:
        if self._pid != os.getpid():  # an event loop does not survive a fork
            # Never closed here: the parent's poll set is shared, and would lose its sockets.
            self._inherited.append(self._fs)
            fs = open_filesystem(self.url, self._storage)
            self._direct = DirectGet(fs, self._storage) if self._is_s3 else None
            self._retrying = threading.Semaphore(RETRIES_AT_ONCE)
            # Last: other threads take this for done, and the parent's connections are not ours.
            self._fs, self._pid = fs, os.getpid()
        return self._fs

    def _download(self, fs: Any, path: str, start: int = 0, length: int | None = None) -> bytes:
        if self._direct is not None:
            try:
                return self._direct.get(path, start, length)
            except NotServed:
                self._direct = None  # for good: what does not suit one object suits none
        if length is not None:
            return bytes(fs.cat_file(path, start=start, end=start + length))
        # One stream without asking for the size first: callers read several objects at once.
        return bytes(fs.cat_file(path, **({"max_concurrency": 1} if self._is_s3 else {})))

    def call(self, verb: str, name: str, attempt: Callable[[Any], Result]) -> Result:
        """Run `attempt`, again after a passing failure: at once never, and not all threads."""
        where, last, fs = f"{self.url}/{name}", "", self._filesystem()
        for number in range(self._storage.retries + 1):
            try:
                with self._turn() if number else nullcontext():
                    return attempt(fs)
            except DpalError:
                raise
            except Exception as error:
                passing, failure = judge_failure(error)
                if not passing:
                    raise tell(verb, where, error, self._scrub(failure)) from None
                last, asked = failure, wait_asked_for(error)
            if number < self._storage.retries:
                if self._telemetry is not None:
                    self._telemetry.report(STORAGE_RETRIES, 1)
                drawn = random.uniform(0, min(FIRST_DELAY_S * 2**number, LONGEST_DELAY_S))
                self._sleep(min(asked + drawn, LONGEST_DELAY_S))
        raise StorageError(
            f"cannot {verb} {where!r} after {self._storage.retries + 1} attempts: "
            f"{self._scrub(last)}"
        ) from None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One of a few threads that ask again: a store in trouble is not met by all at once.

        Waiting for a turn is bounded, so that the time until a failure is told is, too.
        """
        has_turn = self._retrying.acquire(timeout=LONGEST_DELAY_S)
        try:
            yield
        finally:
            if has_turn:
                self._retrying.release()

    def _scrub(self, text: str) -> str:
        storage = self._storage
        return scrub(text, storage.key.get_secret_value(), storage.secret.get_secret_value())


def _version(info: dict[str, Any]) -> str:
    fields = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")
    return next((str(info[field]) for field in fields if info.get(field)), "")
