"""The covariance of a teacher's patch tokens, beside the header of its cache.

    covariance.npy = NumPy array file, float64 [D, D] | SHA-256 of (cache digest + array file)

`numpy.load` reads the file as it is and never sees the 32 bytes after the array. The checksum
covers the cache's digest, so that a file moved from another cache is refused too.

Legend: D teacher width.
"""

import hashlib
import io

import numpy as np

from dpal.base.errors import DataError

COVARIANCE = "covariance.npy"
CHECKSUM_BYTES = 32

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def covariance_bytes(covariance: Matrix, digest: str) -> bytes:
    """The object; equal matrices give equal bytes.

    Args:
        covariance: symmetric [D, D].
        digest: of the cache it lies in.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(covariance, dtype="<f8"), allow_pickle=False)
    return buffer.getvalue() + _checksum(buffer.getvalue(), digest)


def read_covariance(data: bytes, digest: str, width: int, where: str) -> Matrix:
    """Read what `covariance_bytes` wrote: float64 [width, width].

    Raises:
        DataError: naming `where`, when it is damaged, of another cache, or of another width.
    """
    array, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if checksum != _checksum(array, digest):
        raise DataError(
            f"{where!r} is damaged or of another cache: its checksum does not match; delete it, "
            "then run `dpal cache` again"
        )
    try:
        matrix: Matrix = np.load(io.BytesIO(array), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{where!r} is not an array file ({error})") from None
    if matrix.dtype != np.float64 or matrix.shape != (width, width):
        raise DataError(
            f"{where!r} holds {matrix.dtype} {matrix.shape}: accepted is float64 ({width}, {width})"
        )
    return matrix


def _checksum(array: bytes, digest: str) -> bytes:
    return hashlib.sha256(digest.encode() + array).digest()
