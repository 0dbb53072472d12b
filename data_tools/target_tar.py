"""One series of targets as a plain tar of fixed-size records: record i lies at a computed offset.

A member is `<key>.targets`, in the order of the image shard. Stock WebDataset reads the file;
`TargetShard` maps it, looks at its headers once, and copies records from the map to where they are
wanted. Record i lies at `offset_of(i, layout)`, so that a range of a remote file can be read too.

Legend: M samples of a shard, n rows asked for, R record bytes.
"""

import mmap
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools import tar
from data_tools.tar import BLOCK, index_tar
from data_tools.tar_headers import plain_headers
from dpal.base.errors import DataError
from dpal.record import RecordLayout

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
EXTENSION = "targets"
END = 2 * BLOCK  # two zero blocks end an archive


class TargetTarBuilder:
    """Collects the records of one series of one shard; equal records give equal bytes.

    Args:
        keys: sample keys, in the order of the image shard [M].
        layout: of every record.
    """

    def __init__(self, keys: Sequence[str], layout: RecordLayout) -> None:
        self.layout = layout
        self._bytes = np.zeros(len(keys) * stride_of(layout) + END, dtype=np.uint8)
        self._rows = self._bytes[:-END].reshape(len(keys), stride_of(layout))
        for row, key in zip(self._rows, keys, strict=True):
            row[:BLOCK] = np.frombuffer(_header(key, layout.num_bytes), dtype=np.uint8)

    def fill(self, start: int, records: Bytes) -> None:
        """Put records [n, R] at rows `start`, `start + 1`, ..."""
        stop = start + len(records)
        self._rows[start:stop, BLOCK : BLOCK + self.layout.num_bytes] = records

    def to_bytes(self) -> bytes:
        """The tar."""
        return self._bytes.tobytes()


class TargetShard:
    """Records of one series of one shard; safe to read from several threads.

    Attributes:
        keys: sample keys, in the order of the image shard.
        checked: one byte a record, 1 once its checksum was found right. A record is checked when it
            is first read; who opens a file again may hand the bytes on with `trust`.

    Raises:
        DataError: naming the file, when it is damaged or of another layout.
    """

    def __init__(self, data: bytes | mmap.mmap, layout: RecordLayout, where: str) -> None:
        self.layout, self._where = layout, where
        keys = _plain_keys(data, layout)
        self.keys = _any_keys(data, layout, where) if keys is None else keys
        self.checked = bytearray(len(self.keys))
        rows = np.frombuffer(data, dtype=np.uint8, count=len(self.keys) * stride_of(layout))
        rows = rows.reshape(len(self.keys), stride_of(layout))
        self._records: Bytes = rows[:, BLOCK : BLOCK + layout.num_bytes]
        self._crc_start = layout.crc_start

    def __len__(self) -> int:
        return len(self.keys)

    def trust(self, checked: bytearray) -> None:
        """Share `checked` with another `TargetShard` of the same file."""
        assert len(checked) == len(self)
        self.checked = checked

    def read(self, row: int, out: Bytes) -> None:
        """Copy a record into contiguous uint8 [R]. Raises DataError naming a damaged key."""
        out[:] = self._records[row]
        if self.checked[row]:
            return
        # Of the copy, which is still in the core's cache.
        if zlib.crc32(out.data[: self._crc_start]) != int.from_bytes(out[-4:].tobytes(), "little"):
            raise DataError(
                f"targets {self._where!r}: the record of sample {self.keys[row]!r} is damaged; "
                "delete the file and its ledger row, then run `dpal cache` again"
            )
        self.checked[row] = 1

    def records(self, rows: Sequence[int], out: Bytes | None = None) -> Bytes:
        """A copy of the records of `rows`: uint8 [n, R]. Raises DataError naming a damaged key.

        Args:
            out: contiguous uint8 [n, R] to copy into; None takes new memory, which costs more than
                the copy unless the process keeps what it frees (`dpal.base.memory`).
        """
        if out is None:
            out = np.empty((len(rows), self.layout.num_bytes), dtype=np.uint8)
        for row, place in zip(rows, out, strict=True):
            self.read(row, place)
        return out

    def require_keys(self, keys: Sequence[str]) -> None:
        """Raise DataError unless the targets are of exactly the samples `keys`, in order."""
        if self.keys == tuple(keys):
            return
        for row, (mine, wanted) in enumerate(zip(self.keys, keys, strict=False)):
            if mine != wanted:
                raise DataError(
                    f"targets {self._where!r} do not belong to the image shard: "
                    f"row {row} is {mine!r}, the image is {wanted!r}"
                )
        raise DataError(
            f"targets {self._where!r} do not belong to the image shard: {len(self.keys)} records "
            f"for {len(keys)} images"
        )


def offset_of(row: int, layout: RecordLayout) -> int:
    """Where record `row` begins in the file; it is `layout.num_bytes` long."""
    return row * stride_of(layout) + BLOCK


def stride_of(layout: RecordLayout) -> int:
    """Bytes from one record to the next: header block plus padded record."""
    return BLOCK + -(-layout.num_bytes // BLOCK) * BLOCK


def _plain_keys(data: bytes | mmap.mmap, layout: RecordLayout) -> tuple[str, ...] | None:
    """Sample keys of a tar whose headers all are as `TargetTarBuilder` writes them; else None."""
    stride = stride_of(layout)
    count, rest = divmod(len(data) - END, stride)
    if count < 1 or rest or count > tar.MAX_MEMBERS or len(data) > tar.MAX_SHARD_BYTES:
        return None
    if data[-END:] != bytes(END) or layout.num_bytes > tar.MAX_MEMBER_BYTES:
        return None
    blocks = np.frombuffer(data, dtype=np.uint8, count=count * stride).reshape(count, stride)
    found = plain_headers(blocks[:, :BLOCK])
    if found is None or (found.sizes != layout.num_bytes).any():
        return None
    parts = [name.partition(".") for name in found.names]
    keys = tuple(key for key, _dot, _extension in parts)
    whole = all(extension == EXTENSION for _key, _dot, extension in parts)
    return keys if whole and len(set(keys)) == count else None


def _any_keys(data: bytes | mmap.mmap, layout: RecordLayout, where: str) -> tuple[str, ...]:
    """Sample keys of any tar of records, header by header; says what is wrong with it."""
    entries = index_tar(data, where)
    for row, entry in enumerate(entries):
        span = entry.members.get(EXTENSION)
        if span != (offset_of(row, layout), layout.num_bytes):
            raise DataError(
                f"targets {where!r}: sample {entry.key!r} is not a record of "
                f"{layout.num_bytes} bytes at row {row}"
            )
    if len(data) != len(entries) * stride_of(layout) + END:
        raise DataError(f"targets {where!r}: {len(data)} bytes do not fit {len(entries)} rows")
    return tuple(entry.key for entry in entries)


def _header(key: str, size: int) -> bytes:
    member = tarfile.TarInfo(f"{key}.{EXTENSION}")
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, errors="strict")
    except (ValueError, UnicodeError):
        raise DataError(f"sample key {key!r} does not fit into a tar header") from None
