"""Remote object stores through fsspec, with this project's own retries and error sentences."""

import errno
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.exceptions import FSTimeoutError

from data_tools.storage import Buffer, check_name, require_length
from dpal.base.errors import ConfigError, DataError, DpalError, StorageError
from dpal.base.recipe import Storage
from dpal.base.telemetry import STORAGE_RETRIES, Telemetry

Result = TypeVar("Result")

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 20.0
_RETRIED_ERRNO = {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
_RETRIED_NAMES = {
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    "IncompleteRead",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServerDisconnectedError",
}
_REFUSED_NAMES = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}


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
        self._fs: Any = None
        self._pid = 0
        _check_scheme(self.url)

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, Storage]]:
        return RemoteStore, (self.url, self._storage)

    def get(self, name: str) -> bytes:
        """All bytes of `name`."""
        path = self._path(name)
        return self._call("read", name, lambda fs: bytes(fs.cat_file(path)))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of `name` from `start`; DataError if it is shorter."""
        path = self._path(name)
        if length == 0:
            return b""
        data = self._call(
            "read", name, lambda fs: bytes(fs.cat_file(path, start=start, end=start + length))
        )
        return require_length(data, length, start, f"{self.url}/{name}")

    def put(self, name: str, data: Buffer) -> None:
        """Write `name`, replacing what was there; readers see the old or the new object."""
        path, body = self._path(name), bytes(data) if not isinstance(data, bytes) else data
        self._call("write", name, lambda fs: fs.pipe_file(path, body))

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
                if not _is_conflict(error):
                    raise
                return attempts > 1 and bytes(fs.cat_file(path)) == data
            return True

        return self._call("write", name, attempt)

    def exists(self, name: str) -> bool:
        """Whether `name` is an object (a prefix of objects is not)."""
        path = self._path(name)

        def attempt(fs: Any) -> bool:
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return False

        return self._call("read", name, attempt)

    def size(self, name: str) -> int:
        """Number of bytes of `name`."""
        path = self._path(name)
        return self._call("read", name, lambda fs: int(fs.info(path)["size"]))

    def list(self, prefix: str = "") -> list[str]:
        """Sorted names of all objects that start with `prefix`; empty if there is none."""
        folder = prefix.rpartition("/")[0]
        top = self._path(folder) if folder else self.url

        def attempt(fs: Any) -> list[str]:
            root = str(fs._strip_protocol(self.url)).rstrip("/") + "/"
            try:
                found = fs.find(top)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                found = []
            return sorted(str(path)[len(root) :] for path in found if str(path).startswith(root))

        return [name for name in self._call("list", prefix, attempt) if name.startswith(prefix)]

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens if it is not there."""
        path = self._path(name)

        def attempt(fs: Any) -> None:
            try:
                fs.rm_file(path)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise

        self._call("delete", name, attempt)

    def _path(self, name: str) -> str:
        return f"{self.url}/{check_name(name, self.url)}"

    def _filesystem(self) -> Any:
        if self._pid != os.getpid():  # an event loop does not survive a fork
            self._fs, self._pid = _open_filesystem(self.url, self._storage), os.getpid()
        return self._fs

    def _call(self, verb: str, name: str, attempt: Callable[[Any], Result]) -> Result:
        """Run `attempt`, again after a passing failure, with doubled delay and jitter."""
        where = f"{self.url}/{name}"
        for number in range(self._storage.retries + 1):
            try:
                return attempt(self._filesystem())
            except DpalError:
                raise
            except Exception as error:
                passing, failure = _judge(error)
                if not passing:
                    raise self._sentence(verb, where, error, failure) from None
                last = failure
            if number < self._storage.retries:
                if self._telemetry is not None:
                    self._telemetry.report(STORAGE_RETRIES, 1)
                delay = min(FIRST_DELAY_S * 2**number, LONGEST_DELAY_S)
                self._sleep(delay * random.uniform(0.5, 1.5))
        raise StorageError(
            f"cannot {verb} {where!r} after {self._storage.retries + 1} attempts: "
            f"{self._scrub(last)}"
        ) from None

    def _sentence(self, verb: str, where: str, error: Exception, failure: str) -> DpalError:
        code = _code(error)
        if isinstance(error, FileNotFoundError):
            if code == "NoSuchBucket" or verb == "write":
                return StorageError(f"cannot {verb} {where!r}: the bucket does not exist")
            return DataError(f"object {where!r} does not exist")
        if isinstance(error, PermissionError) or type(error).__name__ in _REFUSED_NAMES:
            return StorageError(
                f"cannot {verb} {where!r}: the store refuses these credentials "
                f"({code or type(error).__name__}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or storage.key and storage.secret"
            )
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return StorageError(f"cannot {verb} {where!r}: no space left")
        return StorageError(f"cannot {verb} {where!r}: {self._scrub(failure)}")

    def _scrub(self, text: str) -> str:
        storage = self._storage
        secrets = [storage.key.get_secret_value(), storage.secret.get_secret_value()]
        secrets += [os.environ.get(name, "") for name in _SECRET_VARIABLES]
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return re.sub(r"//[^/@\s]+@", "//***@", text)


_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def _check_scheme(url: str) -> None:
    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        raise ConfigError(
            f"storage url {url!r}: scheme {scheme!r} is unknown or its fsspec package is not "
            "installed; accepted are a local path, file://, s3://"
        ) from None


def _open_filesystem(url: str, storage: Storage) -> Any:
    scheme = url.partition("://")[0]
    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    config: dict[str, Any] = {
        "connect_timeout": storage.timeout_s,
        "read_timeout": storage.timeout_s,
        "retries": {"total_max_attempts": 1},  # retries are counted and bounded here, once
    }
    if storage.endpoint_url:
        config["s3"] = {"addressing_style": "path"}
    filesystem = fsspec.filesystem(
        "s3",
        endpoint_url=storage.endpoint_url or None,
        key=storage.key.get_secret_value() or None,
        secret=storage.secret.get_secret_value() or None,
        config_kwargs=config,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.retries = 1
    return filesystem


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _response(error: BaseException) -> dict[str, Any]:
    """The S3 answer behind an error of s3fs; empty if there was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_conflict(error: BaseException) -> bool:
    return isinstance(error, FileExistsError) or _status(error) == 412


def _judge(error: Exception) -> tuple[bool, str]:
    """Whether a failure may pass by itself, and how it is told (without the server's text)."""
    status, code = _status(error), _code(error)
    if status:
        # 409: another conditional write is under way; 408 and 429: the store asks to wait.
        passing = (status >= 500 and status != 501) or status in (408, 409, 429)
        return passing, f"the store answered {status} {code}".rstrip()
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False, str(error)
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    passing = isinstance(error, (TimeoutError, FSTimeoutError, ConnectionError)) or (
        (isinstance(error, OSError) and error.errno in _RETRIED_ERRNO)
        or bool(names & _RETRIED_NAMES)
    )
    return passing, f"{type(error).__name__}: {' '.join(str(error).split())}"
