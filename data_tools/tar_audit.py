"""Auditing tars that no manifest lists: shards of another program, or an unfinished sharding."""

from collections.abc import Sequence
from typing import NamedTuple

from data_tools.audit import Finding, audit_each, shortened
from data_tools.decode import decode_rgb
from data_tools.image_header import read_header
from data_tools.shard import IMAGE_EXTENSIONS, map_file
from data_tools.storage import Buffer, LocalStore, ObjectStore
from data_tools.tar import MAX_SHARD_BYTES, Entry, index_tar
from dpal.base.errors import DataError
from dpal.base.inputs import Data

AS_SOURCE = "make it again from its source, or name it in data.images: what is sound is sharded"


class Tars(NamedTuple):
    """What a folder of tars holds, and what is wrong with it.

    Attributes:
        num_samples: in all tars that could be indexed.
        num_images: samples with an image.
        num_bytes: of all tars.
        findings: damaged tars, and samples whose image has no valid header.
    """

    num_samples: int
    num_images: int
    num_bytes: int
    findings: list[Finding]


def audit_tars(store: ObjectStore, names: Sequence[str], *, decode: bool = False) -> Tars:
    """Index the tars `names` as a loader would, and read the header of every image.

    Args:
        decode: decode every image as well.
    """
    counts: dict[str, tuple[int, int, int]] = {}

    def audit(name: str) -> list[Finding]:
        where = f"{store.url}/{name}"
        try:
            data = _bytes_of(store, name, where)
            entries = index_tar(data, where)
        except DataError as error:
            counts[name] = (0, 0, 0)
            return [Finding(name, str(error), AS_SOURCE)]
        images = [(entry, _image_of(entry)) for entry in entries]
        counts[name] = (len(entries), sum(ext is not None for _, ext in images), len(data))
        return shortened(_damaged(data, images, name, decode), name, AS_SOURCE)

    findings = audit_each(names, audit, store)
    samples, num_images, num_bytes = (sum(column) for column in zip(*counts.values(), strict=True))
    return Tars(samples, num_images, num_bytes, findings)


def _bytes_of(store: ObjectStore, name: str, where: str) -> Buffer:
    size = store.size(name)
    if size > MAX_SHARD_BYTES:
        raise DataError(f"shard {where!r} has {size} bytes: accepted are {MAX_SHARD_BYTES}")
    return map_file(store.path(name), where) if isinstance(store, LocalStore) else store.get(name)


def _image_of(entry: Entry) -> str | None:
    return next((ext for ext in entry.members if ext.lower() in IMAGE_EXTENSIONS), None)


def _damaged(
    data: Buffer, images: Sequence[tuple[Entry, str | None]], name: str, decode: bool
) -> list[Finding]:
    findings = []
    limit = Data.model_fields["max_pixels"].default
    for entry, extension in images:
        if extension is None:
            continue
        offset, size = entry.members[extension]
        encoded = data[offset : offset + size]
        try:
            read_header(encoded)
            if decode:
                decode_rgb(encoded, limit)
        except DataError as error:
            findings.append(Finding(f"{name}#{entry.key}", str(error), AS_SOURCE))
    return findings
