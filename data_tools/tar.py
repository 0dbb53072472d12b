"""An index of a tar's members, made from its headers; nothing is ever unpacked to a path.

Only what a WebDataset shard needs is accepted: regular files in the POSIX ustar (or old) format.
Header layout: POSIX.1-1988 ustar, 512-byte blocks.
"""

import mmap
from collections.abc import Mapping
from typing import NamedTuple

from dpal.base.errors import DataError

BLOCK = 512
_ZERO = bytes(BLOCK)


class Span(NamedTuple):
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One sample: its key and its members by extension (`jpg`, `json`, ...)."""

    key: str
    members: Mapping[str, Span]


def index_tar(data: bytes | mmap.mmap, name: str) -> tuple[Entry, ...]:
    """All samples of a tar, in order; `name` names the tar in errors.

    Raises:
        DataError: for links, devices, absolute or climbing names, sizes that leave the file,
            duplicate members, samples whose members are not adjacent, damage, truncation.
    """
    entries: list[Entry] = []
    members: dict[str, Span] = {}
    seen: set[str] = set()
    offset, key = 0, ""
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise DataError(f"shard {name!r} is truncated: it has no end-of-archive block")
        if header == _ZERO:
            break
        member, size = _parse(header, offset, name)
        start = offset + BLOCK
        if start + size > len(data):
            raise DataError(f"shard {name!r}: member {member!r} is larger than what is left of it")
        member_key, extension = _split(member, name)
        if member_key != key or not entries:
            if member_key in seen:
                raise DataError(
                    f"shard {name!r}: members of sample {member_key!r} are not adjacent"
                )
            key, members = member_key, {}
            seen.add(key)
            entries.append(Entry(key, members))
        if extension in members:
            raise DataError(f"shard {name!r}: member {member!r} is there twice")
        members[extension] = Span(start, size)
        offset = start + -(-size // BLOCK) * BLOCK
    return tuple(entries)


def _parse(header: bytes, offset: int, name: str) -> tuple[str, int]:
    """Member name and size from one header block."""
    stored = _octal(header[148:156], "checksum", offset, name)
    if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
        raise DataError(f"shard {name!r}: the tar header at byte {offset} is damaged")
    kind = header[156:157]
    try:
        member = _text(header[:100])
        if header[257:262] == b"ustar" and header[262:263] == b"\0":
            prefix = _text(header[345:500])
            member = f"{prefix}/{member}" if prefix else member
    except UnicodeDecodeError:
        raise DataError(f"shard {name!r}: the member name at byte {offset} is no text") from None
    if kind not in (b"0", b"\0"):
        raise DataError(
            f"shard {name!r}: member {member!r} has tar type {kind.decode('latin-1')!r}: accepted "
            "are regular files (no links, folders, devices or extended headers)"
        )
    return member, _octal(header[124:136], "size", offset, name)


def _octal(field: bytes, what: str, offset: int, name: str) -> int:
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise DataError(f"shard {name!r}: the {what} in the header at byte {offset} is no number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode()


def _split(member: str, name: str) -> tuple[str, str]:
    """Sample key and extension: the extension starts at the first dot of the last part."""
    folder, slash, last = member.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or not extension:
        raise DataError(f"shard {name!r}: member {member!r} is not of the form <key>.<extension>")
    parts = folder.split("/") if slash else []
    if "\\" in member or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"shard {name!r}: member {member!r} is not a plain relative name")
    return f"{folder}{slash}{stem}", extension
