"""One series of targets as a plain tar of fixed-size records: record i lies at a computed offset.

A member is `<key>.targets`, in the order of the image shard. Stock WebDataset reads the file;
`TargetShard` maps it and gathers records without parsing anything but the headers, once.

Legend: M samples of a shard, n rows asked for, R record bytes.
"""

import mmap
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools.tar import BLOCK, index_tar
from dpal.base.errors import DataError
from dpal.record import RecordLayout, damaged_rows

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

    Raises:
        DataError: naming the file, when it is damaged or of another layout.
    """

    def __init__(self, data: bytes | mmap.mmap, layout: RecordLayout, where: str) -> None:
        self.layout, self._where = layout, where
        entries, stride = index_tar(data, where), stride_of(layout)
        self.keys = tuple(entry.key for entry in entries)
        for row, entry in enumerate(entries):
            span = entry.members.get(EXTENSION)
            if span != (row * stride + BLOCK, layout.num_bytes):
                raise DataError(
                    f"targets {where!r}: sample {entry.key!r} is not a record of "
                    f"{layout.num_bytes} bytes at row {row}"
                )
        if len(data) != len(entries) * stride + END:
            raise DataError(f"targets {where!r}: {len(data)} bytes do not fit {len(entries)} rows")
        flat = np.frombuffer(data, dtype=np.uint8, count=len(entries) * stride)
        self._rows = flat.reshape(len(entries), stride)

    def __len__(self) -> int:
        return len(self.keys)

    def records(self, rows: Sequence[int]) -> Bytes:
        """A copy of the records of `rows`: uint8 [n, R]. Raises DataError naming a damaged key."""
        found: Bytes = self._rows[np.asarray(rows), BLOCK : BLOCK + self.layout.num_bytes]
        damaged = damaged_rows(found, self.layout)
        if damaged:
            key = self.keys[rows[damaged[0]]]
            raise DataError(
                f"targets {self._where!r}: the record of sample {key!r} is damaged; delete the "
                "file and its ledger row, then run `dpal cache` again"
            )
        return found

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


def stride_of(layout: RecordLayout) -> int:
    """Bytes from one record to the next: header block plus padded record."""
    return BLOCK + -(-layout.num_bytes // BLOCK) * BLOCK


def _header(key: str, size: int) -> bytes:
    member = tarfile.TarInfo(f"{key}.{EXTENSION}")
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, errors="strict")
    except (ValueError, UnicodeError):
        raise DataError(f"sample key {key!r} does not fit into a tar header") from None
