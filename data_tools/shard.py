"""Reading a shard: verified once, indexed once, members by offset."""

import json
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.local_cache import LocalCache
from data_tools.manifest import ShardRef, keys_digest
from data_tools.storage import LocalStore, ObjectStore
from data_tools.tar import Entry, Span, index_tar
from data_tools.verified import Buffer, Content, fetch_verified
from dpal.base.errors import DataError, StorageError
from dpal.base.telemetry import Telemetry

_NO_SPAN = Span(0, 0)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


class DamagedShard(DataError):
    """A shard is there, but its bytes are not those of its manifest."""


class Shard:
    """Samples of one shard, in order; safe to read from several threads.

    Args:
        data: all bytes of the shard.
        file: number of the open file that `data` is a map of, which the shard then owns: members
            are read from it by offset and nothing stays mapped, as a run keeps hundreds open.

    Attributes:
        ref: the manifest's row it was verified against.
        keys: sample keys, in order.
    """

    def __init__(self, ref: ShardRef, data: Buffer, where: str, file: int | None = None) -> None:
        self.ref, self._where, self._file = ref, where, file
        if file is not None:
            weakref.finalize(self, os.close, file)
        self._data = data if file is None else b""
        entries = index_tar(data, where)
        self.keys = tuple(entry.key for entry in entries)
        if len(self.keys) != ref.num_samples or keys_digest(self.keys) != ref.keys_digest:
            raise DataError(f"shard {where!r} does not hold the samples its manifest lists")
        images = [_image(entry, where) for entry in entries]
        metas = [entry.members.get("json", _NO_SPAN) for entry in entries]
        self._images = np.array(images, dtype=np.int64).reshape(-1, 2)
        self._metas = np.array(metas, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.keys)

    def image_bytes(self, index: int) -> bytes:
        """Encoded image of sample `index`, as it was ingested."""
        return self._read(self._images[index])

    def meta(self, index: int) -> dict[str, Any]:
        """The sample's JSON: `source`, `height`, `width`. Raises DataError if damaged."""
        try:
            meta = json.loads(self._read(self._metas[index]))
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            raise DataError(
                f"shard {self._where!r}: sample {self.keys[index]!r} has no valid .json"
            )
        return meta

    def _read(self, span: npt.NDArray[np.int64]) -> bytes:
        offset, size = span.tolist()
        if self._file is None:
            return self._data[offset : offset + size]
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise DataError(f"shard {self._where!r} was cut short while it was read")
        return data


def read_shard(
    store: ObjectStore,
    ref: ShardRef,
    cache: LocalCache | None,
    telemetry: Telemetry | None = None,
) -> Shard:
    """Shard `ref` of `store`, verified against its checksum.

    Args:
        cache: local copies of remote shards; None keeps a remote shard in memory. Local shards
            are mapped in place, never copied, and hashed once by each store object.
        telemetry: told of bytes that were damaged on the way and fetched again.

    Raises:
        DamagedShard: naming the shard, when its bytes are not those of `ref`.
        DataError: when it is missing.
    """
    where, content = f"{store.url}/{ref.name}", Content(ref.sha256, ref.num_bytes)
    damaged = DamagedShard(
        f"shard {where!r} is damaged: its bytes do not match the manifest's size and checksum"
    )
    if isinstance(store, LocalStore):
        path = store.path(ref.name)
        data, status = _map(path, where)
        if not store.verified.check(data, status, content):
            raise damaged
        return Shard(ref, data, where, _reopened(path, status.st_ino))

    def fetch() -> bytes:
        return fetch_verified(lambda: store.get(ref.name), content, damaged, telemetry)

    if cache is None:
        return Shard(ref, fetch(), where)
    data = cache.get(*content, fetch)
    return Shard(ref, data, where, _reopened(cache.path(ref.sha256)))


def map_file(path: Path, where: str) -> Buffer:
    """The bytes of a file, mapped; `where` names it in the DataError when it does not exist."""
    return _map(path, where)[0]


def _map(path: Path, where: str) -> tuple[Buffer, os.stat_result]:
    """The bytes of a file, and its status while they were mapped."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                return b"", status  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), status
    except FileNotFoundError:
        raise DataError(f"shard {where!r} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def _reopened(path: Path, inode: int | None = None) -> int | None:
    """The number of a file that was just mapped; None where it has gone, or is another one now.

    Args:
        inode: of the file that was mapped; None for a copy, whose name is its checksum.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if inode in (None, os.fstat(file).st_ino):
        return file
    os.close(file)
    return None


def _image(entry: Entry, where: str) -> Span:
    spans = [entry.members[ext] for ext in IMAGE_EXTENSIONS if ext in entry.members]
    if len(spans) != 1:
        raise DataError(f"shard {where!r}: sample {entry.key!r} does not have exactly one image")
    return spans[0]
