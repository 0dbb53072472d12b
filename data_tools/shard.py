"""Reading a shard: verified once, indexed once, members by offset."""

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

from data_tools.manifest import ShardRef, keys_digest
from data_tools.storage import LocalStore, ObjectStore
from data_tools.tar import Entry, Span, index_tar
from dpal.base.errors import DataError, StorageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")


class Shard:
    """Samples of one shard, in order; safe to read from several threads.

    Attributes:
        ref: the manifest's row it was verified against.
        keys: sample keys, in order.
    """

    def __init__(self, ref: ShardRef, data: bytes | mmap.mmap, where: str) -> None:
        self.ref, self._data, self._where = ref, data, where
        entries = index_tar(data, where)
        self.keys = tuple(entry.key for entry in entries)
        if len(self.keys) != ref.num_samples or keys_digest(self.keys) != ref.keys_digest:
            raise DataError(f"shard {where!r} does not hold the samples its manifest lists")
        self._images = tuple(_image(entry, where) for entry in entries)
        self._metas = tuple(entry.members.get("json") for entry in entries)

    def __len__(self) -> int:
        return len(self.keys)

    def image_bytes(self, index: int) -> bytes:
        """Encoded image of sample `index`, as it was ingested."""
        return self._read(self._images[index])

    def meta(self, index: int) -> dict[str, Any]:
        """The sample's JSON: `source`, `height`, `width`. Raises DataError if damaged."""
        span = self._metas[index]
        try:
            meta = json.loads(self._read(span)) if span is not None else None
        except ValueError:
            meta = None
        if not isinstance(meta, dict):
            raise DataError(
                f"shard {self._where!r}: sample {self.keys[index]!r} has no valid .json"
            )
        return meta

    def _read(self, span: Span) -> bytes:
        return self._data[span.offset : span.offset + span.size]


def read_shard(store: ObjectStore, ref: ShardRef, cache_dir: Path | None) -> Shard:
    """Shard `ref` of `store`, verified against its checksum.

    Args:
        cache_dir: local folder for copies of remote shards, named by checksum; None keeps a
            remote shard in memory. Local shards are mapped in place and never copied.

    Raises:
        DataError: naming the shard, when it is missing or its bytes are not those of `ref`.
    """
    where = f"{store.url}/{ref.name}"
    if isinstance(store, LocalStore):
        data = map_file(store.path(ref.name), where)
        if not _matches(data, ref):
            raise _mismatch(where)
        return Shard(ref, data, where)
    cached = cache_dir / f"{ref.sha256}.tar" if cache_dir is not None else None
    if cached is not None and cached.is_file():
        data = map_file(cached, where)
        if _matches(data, ref):
            return Shard(ref, data, where)
    fetched = _fetch(store, ref, where)
    if cached is None:
        return Shard(ref, fetched, where)
    _keep(cached, fetched)
    return Shard(ref, map_file(cached, where), where)


def _fetch(store: ObjectStore, ref: ShardRef, where: str) -> bytes:
    for _attempt in range(2):  # the second tells damage on the way from damage in the store
        data = store.get(ref.name)
        if _matches(data, ref):
            return data
    raise _mismatch(where)


def _matches(data: bytes | mmap.mmap, ref: ShardRef) -> bool:
    return len(data) == ref.num_bytes and hashlib.sha256(data).hexdigest() == ref.sha256


def _mismatch(where: str) -> DataError:
    return DataError(
        f"shard {where!r} is damaged: its bytes do not match the manifest's size and checksum"
    )


def map_file(path: Path, where: str) -> bytes | mmap.mmap:
    """The bytes of a file, mapped; `where` names it in the DataError when it does not exist."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"shard {where!r} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def _keep(path: Path, data: bytes) -> None:
    """Write a copy aside and rename it: two processes may fetch the same shard at once."""
    LocalStore(path.parent).put(path.name, data)


def _image(entry: Entry, where: str) -> Span:
    spans = [entry.members[ext] for ext in IMAGE_EXTENSIONS if ext in entry.members]
    if len(spans) != 1:
        raise DataError(f"shard {where!r}: sample {entry.key!r} does not have exactly one image")
    return spans[0]
