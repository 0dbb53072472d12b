"""What an exception of a remote store means: may it pass by itself, and how it is told.

No text of the server and no credential reaches a user: failures are told by status and code.
"""

import errno
import os
import re
from typing import Any

from fsspec.exceptions import FSTimeoutError

from dpal.base.errors import DataError, DpalError, StorageError

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
# By name, as aiohttp and botocore are there only when an S3 store is opened.
_RETRIED_NAMES = {
    "HTTPClientError",
    "ResponseParserError",
    "IncompleteReadError",
    "IncompleteRead",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServerDisconnectedError",
    "TimeoutError",  # these three of urllib3
    "ProtocolError",
    "NewConnectionError",
}
_REFUSED_NAMES = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def judge_failure(error: Exception) -> tuple[bool, str]:
    """Whether a failure may pass by itself (so it is retried), and what it was."""
    status, code = _status(error), code_of(error)
    if status:
        # 409: another conditional write is under way; 408 and 429: the store asks to wait.
        passing = (status >= 500 and status != 501) or status in (408, 409, 429)
        return passing, f"the store answered {status} {code}".rstrip()
    if isinstance(error, FileNotFoundError | PermissionError):
        return False, type(error).__name__
    names = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    passing = (
        isinstance(error, TimeoutError | FSTimeoutError | ConnectionError)
        or (isinstance(error, OSError) and error.errno in _RETRIED_ERRNO)
        or bool(names & _RETRIED_NAMES)
    )
    return passing, f"{type(error).__name__}: {' '.join(str(error).split())}"


def tell(verb: str, where: str, error: Exception, failure: str) -> DpalError:
    """The one sentence for a failure that will not pass; `failure` is scrubbed text."""
    code = code_of(error)
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
    return StorageError(f"cannot {verb} {where!r}: {failure}")


def scrub(text: str, *credentials: str) -> str:
    """`text` without credentials, given or from the environment, URL userinfo and signatures."""
    for secret in (*credentials, *(os.environ.get(name, "") for name in _SECRET_VARIABLES)):
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"X-Amz-(\w+)=[^&\s]+", r"X-Amz-\1=***", text)
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def code_of(error: BaseException) -> str:
    """The S3 error code behind an exception (`NoSuchBucket`, ...); empty if there is none."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def wait_asked_for(error: BaseException) -> float:
    """Seconds that the store asks to wait (Retry-After); 0 when it does not say."""
    headers = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    values = [str(headers[name]) for name in headers if str(name).lower() == "retry-after"]
    return float(values[0]) if values and values[0].isdecimal() else 0.0


def is_conflict(error: BaseException) -> bool:
    """Whether a conditional write found the object already there."""
    return isinstance(error, FileExistsError) or _status(error) == 412


def _status(error: BaseException) -> int:
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _response(error: BaseException) -> dict[str, Any]:
    """The S3 answer behind an error of s3fs; empty if there was none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain
