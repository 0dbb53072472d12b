"""Header blocks of a tar, checked many at a time.

Only headers as they are usually written are taken: a short ASCII name, a regular file, numbers as
octal digits in their usual width. Of anything else `plain_headers` says None; `data_tools.tar` then
reads that tar header by header, and either accepts it or tells what is wrong.

Legend: n headers.
"""

from typing import Any, NamedTuple

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 512
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)
_TYPE, _PREFIX = 156, 345
_IN_A_NAME = np.zeros(256, dtype=bool)
_IN_A_NAME[list(b"\0-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True


class Members(NamedTuple):
    """What n headers say.

    Attributes:
        names: of at least one character, and not beginning with a dot.
        sizes: bytes of the members, int64 [n].
    """

    names: list[str]
    sizes: np.ndarray[Any, np.dtype[np.int64]]


def plain_headers(headers: Bytes) -> Members | None:
    """Names and sizes of header blocks uint8 [n, 512]; None unless all are plain and undamaged.

    Header layout: POSIX.1-1988 ustar.
    """
    headers = np.ascontiguousarray(headers)
    sums, sizes = _octal(headers[:, _CHECKSUM]), _octal(headers[:, _SIZE])
    if sums is None or sizes is None or not np.array_equal(sums, _sums(headers)):
        return None
    ends = np.stack([headers[:, 135], headers[:, 154], headers[:, 155] ^ ord(" ")])
    kind = headers[:, _TYPE]
    names = np.ascontiguousarray(headers[:, _NAME])
    if ends.any() or headers[:, _PREFIX].any() or not ((kind == 0) | (kind == ord("0"))).all():
        return None
    end = names == 0
    begins = end[:, 0] | (names[:, 0] == ord("."))
    if begins.any() or (end[:, :-1] & ~end[:, 1:]).any() or not _IN_A_NAME[names].all():
        return None
    return Members([name.decode() for name in names.view("S100")[:, 0].tolist()], sizes)


def _octal(digits: Bytes) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Numbers of n rows of octal digits; None when there is anything else in them."""
    values = digits ^ ord("0")  # the digits are 0x30 to 0x37
    if (values > 7).any():
        return None
    places = 8 ** np.arange(digits.shape[1], dtype=np.int64)[::-1]
    numbers: np.ndarray[Any, np.dtype[np.int64]] = values @ places
    return numbers


def _sums(headers: Bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sums of the bytes of each header, its checksum counted as 8 spaces: int64 [n]."""
    fields = headers[:, 148:156].sum(axis=1, dtype=np.int64)
    total: np.ndarray[Any, np.dtype[np.int64]] = headers.sum(axis=1, dtype=np.uint32) - fields
    return total + 8 * ord(" ")
