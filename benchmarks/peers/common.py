"""What every contestant's file may use: the task, reading a tar by an index, decoding, stacking.

Legend: B images of a batch, H x W pixels.
"""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

BLOCK = 512


@dataclass(frozen=True)
class Task:
    """What one contestant is asked to do.

    Attributes:
        shards: names of the WebDataset shards, in order.
        folder: local folder that holds them (and `<contestant>/`, if it converts them).
        bucket: bucket that holds the same objects; empty for a local task.
        endpoint, key, secret: of the object store.
        images: samples of an epoch.
        batch, height, width: of a batch, uint8 [B, H, W, 3].
        workers: threads or processes beside the consumer; 0 for none where that is possible.
        scratch: an empty folder of this contestant's own.
        seed: of the shuffle.
    """

    shards: tuple[str, ...]
    folder: str
    bucket: str
    endpoint: str
    key: str
    secret: str
    images: int
    batch: int
    height: int
    width: int
    workers: int
    scratch: str
    seed: int = 0

    @classmethod
    def read(cls, text: str) -> "Task":
        """The task that `text`, JSON, describes."""
        values = json.loads(text)
        return cls(**{**values, "shards": tuple(values["shards"])})

    @property
    def remote(self) -> bool:
        """Whether the data come from the object store."""
        return bool(self.bucket)

    def urls(self) -> list[str]:
        """Every shard's path or s3:// address."""
        base = f"s3://{self.bucket}" if self.remote else self.folder
        return [f"{base}/{name}" for name in self.shards]

    def shuffled(self, epoch: int) -> random.Random:
        """The epoch's generator."""
        return random.Random(self.seed * 1_000_003 + epoch)


# A function of the epoch's number; its batches are uint8 [B, H, W, 3] arrays (or, for a contestant
# that only reads, the byte strings of a batch).
Epoch = Callable[[int], Iterable[Any]]


class Member(NamedTuple):
    """One image in a tar: file descriptor, offset and size."""

    file: int
    offset: int
    size: int


def decode(data: bytes) -> np.ndarray:
    """The one decoder of this race: uint8 [H, W, 3]."""
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def decode_stack(images: Sequence[bytes]) -> np.ndarray:
    """Decode one by one and stack, as documentation shows it: uint8 [B, H, W, 3]."""
    return np.stack([decode(data) for data in images])


def decode_rows(images: Sequence[bytes]) -> np.ndarray:
    """Decode images of one size straight into one new array: uint8 [B, H, W, 3]."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(images[0])
    batch = np.empty((len(images), height, width, 3), np.uint8)
    for row, data in zip(batch, images, strict=True):
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=row)
    return batch


def read(member: Member) -> bytes:
    """A member's bytes."""
    return os.pread(member.file, member.size, member.offset)


def image_spans(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of every .jpg in a tar's bytes (POSIX ustar, 512-byte blocks)."""
    offset = 0
    while (header := data[offset : offset + BLOCK]).strip(b"\0"):
        size = int(header[124:135], 8)
        if b".jpg\0" in header[:101]:
            yield offset + BLOCK, size
        offset += BLOCK + -(-size // BLOCK) * BLOCK


def index(paths: Sequence[str]) -> list[Member]:
    """Every image of local tars; the files stay open."""
    members: list[Member] = []
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        spans = image_spans(Path(path).read_bytes())
        members += [Member(file, offset, size) for offset, size in spans]
    return members


def s3_filesystem(task: Task) -> Any:
    """s3fs on the task's server."""
    import s3fs

    return s3fs.S3FileSystem(key=task.key, secret=task.secret, endpoint_url=task.endpoint)


def s3_get(task: Task) -> Callable[[str], bytes]:
    """A function from an object's name to its bytes; for a local task, of a file's."""
    if not task.remote:
        return lambda name: (Path(task.folder) / name).read_bytes()
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        task.bucket,
        endpoint=task.endpoint,
        access_key_id=task.key,
        secret_access_key=task.secret,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return lambda name: bytes(obstore.get(store, name).bytes())


def in_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
