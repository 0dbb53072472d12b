"""The regular files in a tar that others wrote: POSIX ustar, pax or GNU, found by its headers.

More lenient than `data_tools.tar`, which reads this project's own shards: long names are read;
folders, links, devices and sparse files are passed over and counted. Nothing is unpacked, and no
member's name becomes a path. Formats: POSIX.1-2017 pax, GNU tar manual "Basic Tar Format".
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from data_tools.sources.whole_files import OpenFile
from dpal.base.errors import DataError

BLOCK = 512
LONGEST_HEADER = 2**20  # bytes of a pax header or long name
_ZERO = bytes(BLOCK)
_DIGITS = 20  # of a number in a pax header
_PASSED_OVER = {
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "device",
    b"S": "sparse file",
    b"g": "global header",
    b"K": "long link",
    b"V": "label",
}
_UNCOUNTED = (b"5", b"g", b"K", b"V")
_DESCRIBING = (b"x", b"g", b"L", b"K")  # these come before the member that they describe


class Member(NamedTuple):
    """One regular file of a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_members(tar: OpenFile, where: str, left_out: Counter[str]) -> Iterator[Member]:
    """All regular files in order; `where` names the tar in errors.

    Args:
        left_out: members that are passed over are counted here; folders are not.

    Raises:
        DataError: for a damaged or truncated tar, and for sizes that leave it.
    """
    offset, long_name, pax = 0, "", dict[str, str]()
    while True:
        if offset + BLOCK > tar.size:
            raise DataError(f"tar {where!r} is truncated: it has no end-of-archive block")
        header = tar.read(offset, BLOCK)
        if header == _ZERO:
            return
        kind, start = header[156:157], offset + BLOCK
        _check(header, offset, where)
        size = _size(header, {} if kind in _DESCRIBING else pax, offset, where)
        if kind == b"S":
            start = _after_sparse_map(tar, header, start)
        if start + size > tar.size:
            raise DataError(
                f"tar {where!r}: the member at byte {offset} is larger than what is left"
            )
        offset = start + -(-size // BLOCK) * BLOCK
        if kind in (b"x", b"L"):
            body = _body(tar, start, size, where)
            if kind == b"x":
                pax = _records(body, start, where)
            else:
                long_name = _text(body.split(b"\0", 1)[0])
            continue
        name = pax.get("path") or long_name or _short_name(header)
        reason = _PASSED_OVER.get(kind, "" if kind in (b"0", b"\0", b"7") else "unknown type")
        if any(record.startswith("GNU.sparse.") for record in pax):
            reason = "sparse file"
        if not reason and not _is_plain(name):
            reason = "name that is no relative path"
        if kind not in _DESCRIBING:
            long_name, pax = "", {}
        if reason and kind not in _UNCOUNTED:
            left_out[reason] += 1
        elif not reason and not name.endswith("/"):
            yield Member(name.removeprefix("./"), start, size)


def _check(header: bytes, offset: int, where: str) -> None:
    stored = _number(header[148:156], offset, where)
    if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
        raise DataError(f"tar {where!r}: the header at byte {offset} is damaged, or this is no tar")


def _size(header: bytes, pax: dict[str, str], offset: int, where: str) -> int:
    if "size" not in pax:
        return _number(header[124:136], offset, where)
    if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) <= _DIGITS):
        raise DataError(f"tar {where!r}: the size before byte {offset} is no number")
    return int(pax["size"])


def _after_sparse_map(tar: OpenFile, header: bytes, start: int) -> int:
    """Where the data of an old GNU sparse file begin: blocks that go on with its map are first."""
    goes_on = header[482]
    while goes_on:
        goes_on = tar.read(start, BLOCK)[504]
        start += BLOCK
    return start


def _number(field: bytes, offset: int, where: str) -> int:
    """A number in octal digits, or, after a byte 0x80, in binary."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise DataError(f"tar {where!r}: the header at byte {offset} is damaged, or this is no tar")
    return int(digits or b"0", 8)


def _body(tar: OpenFile, start: int, size: int, where: str) -> bytes:
    if size > LONGEST_HEADER:
        raise DataError(
            f"tar {where!r}: the name at byte {start} has {size} bytes, accepted are "
            f"{LONGEST_HEADER}"
        )
    return tar.read(start, size)


def _records(body: bytes, start: int, where: str) -> dict[str, str]:
    """Records of a pax header: `<length> <key>=<value>` and a line end each."""
    records = {}
    while body:
        digits, _, _ = body.partition(b" ")
        number = int(digits) if digits.isdigit() and len(digits) <= _DIGITS else 0
        if not len(digits) + 3 <= number <= len(body):
            raise DataError(f"tar {where!r}: the pax header at byte {start} is damaged")
        record, body = body[len(digits) + 1 : number], body[number:]
        key, equals, value = record.rstrip(b"\n").partition(b"=")
        if not equals:
            raise DataError(f"tar {where!r}: the pax header at byte {start} is damaged")
        records[_text(key)] = _text(value)
    return records


def _short_name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    if header[257:263] == b"ustar\0":
        prefix = _text(header[345:500].split(b"\0", 1)[0])
        return f"{prefix}/{name}" if prefix else name
    return name


def _text(field: bytes) -> str:
    return field.decode("utf-8", "surrogateescape")


def _is_plain(name: str) -> bool:
    parts = name.removeprefix("./").rstrip("/").split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts)
