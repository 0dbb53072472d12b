"""Reading S3 objects over plain HTTP: signed by s3fs, received straight into place.

s3fs keeps the credentials, the endpoint and the region and signs each request as a URL; the body
is received here, in the caller's thread. That costs about two thirds of the processor time of
s3fs' own `cat_file` (benchmarks/bench_storage.py), and it lets the length of every answer be
checked and every transfer be timed, which a download through an event loop hides.
"""

import io
import os
import re
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import urllib3
from botocore.httpsession import where

from dpal.base.inputs import Storage

PIECE_BYTES = 2**18
CONNECTIONS = 32
SIGNED_FOR_S = 3600
_ERROR_BYTES = 2**16
_ELSEWHERE = {301, 302, 307, 308, 400}  # another region or signature, which s3fs finds out


class StoreAnswer(Exception):
    """An answer that is no success; `response` has the form of botocore's errors."""

    def __init__(self, status: int, code: str, headers: dict[str, str]) -> None:
        super().__init__(f"{status} {code}".rstrip())
        metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers}
        self.response = {"Error": {"Code": code}, "ResponseMetadata": metadata}


class NotServed(Exception):
    """This way of reading does not suit the store: s3fs' own has to do."""


class DirectGet:
    """Downloads of one process from one S3 store; may be shared by threads.

    Args:
        filesystem: of s3fs; signs the requests.
        storage: timeouts, and the rate below which a transfer is given up.
    """

    def __init__(self, filesystem: Any, storage: Storage) -> None:
        self._filesystem, self._storage = filesystem, storage
        self._pool = urllib3.PoolManager(
            maxsize=CONNECTIONS,
            timeout=urllib3.Timeout(connect=storage.timeout_s, read=storage.timeout_s),
            retries=False,  # retries are counted and bounded by the caller, once
            ca_certs=os.environ.get("AWS_CA_BUNDLE") or where(),
        )

    def get(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """All bytes of an object, or the `length` from `start` that it has.

        Raises:
            FileNotFoundError, PermissionError, StoreAnswer: what the store answered.
            NotServed: when the request has to go through s3fs.
            OSError, urllib3.exceptions.HTTPError: a connection or transfer that failed.
        """
        headers = {"Accept-Encoding": "identity"}
        if length is not None:
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        url = self._signed(path)
        began = time.monotonic()
        try:
            response = self._pool.request(
                "GET",
                url,
                headers=headers,
                preload_content=False,
                decode_content=False,
                redirect=False,
            )
        except urllib3.exceptions.SSLError as error:
            raise NotServed from error  # s3fs may know of other certificates
        try:
            return self._body(response, began, partial=length is not None)
        except BaseException:
            response.close()  # what is left of the body would be read as the next answer
            raise
        finally:
            response.release_conn()

    def _signed(self, path: str) -> str:
        url = str(self._filesystem.url(path, expires=SIGNED_FOR_S))
        parts = urlsplit(url)
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(
            str(parts.hostname)
        ):
            raise NotServed  # through a proxy
        return url

    def _body(self, response: urllib3.BaseHTTPResponse, began: float, *, partial: bool) -> bytes:
        if response.status == 416:  # the range begins behind the end
            return b""
        if response.status != (206 if partial else 200):
            raise _refusal(response)
        told = response.headers.get("Content-Length")
        if told is None or not told.isdigit():
            raise NotServed  # a body of unknown length cannot be told from a truncated one
        size = int(told)
        allowed = self._storage.timeout_s + size / (self._storage.min_mb_per_s * 1e6)
        paced = _Paced(response, began + allowed)
        data = io.BufferedReader(paced, PIECE_BYTES).read(size)
        if len(data) != size:
            raise ConnectionError(f"the body ended after {len(data)} of {size} bytes")
        return data


class _Paced(io.RawIOBase):
    """The body of an answer until a deadline; read by BufferedReader, which fills its result."""

    def __init__(self, response: urllib3.BaseHTTPResponse, deadline: float) -> None:
        self._response, self._deadline = response, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """One receive, so that a trickle of bytes comes back here and meets the deadline."""
        if time.monotonic() > self._deadline:
            raise TimeoutError("the transfer is slower than storage.min_mb_per_s")
        piece = self._response.read1(min(len(target), PIECE_BYTES), decode_content=False)
        target[: len(piece)] = piece
        return len(piece)


def _refusal(response: urllib3.BaseHTTPResponse) -> Exception:
    """What an answer without the object says."""
    status = response.status
    if status in _ELSEWHERE:
        return NotServed()
    text = response.read(_ERROR_BYTES).decode(errors="replace")
    found = re.search(r"<Code>([A-Za-z0-9.]{1,64})</Code>", text)
    answer = StoreAnswer(status, found.group(1) if found else "", dict(response.headers))
    if status in (401, 403, 404):
        error: Exception = FileNotFoundError() if status == 404 else PermissionError()
        error.__cause__ = answer
        return error
    return answer
