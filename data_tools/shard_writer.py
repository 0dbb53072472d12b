"""Writing shards: the same samples always give the same bytes, and what is finished is kept.

Samples are sorted by key and cut into shards; a shard that already holds exactly the bytes it
should hold is not written again. The manifest is published last.
"""

import hashlib
import io
import json
import mmap
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from data_tools.ingest import KEY_DIGITS, SCAN_FOLDER, Reject, Sample, Sources, Survey
from data_tools.manifest import MANIFEST, Manifest, ShardRef, keys_digest, load_manifest
from data_tools.shard import Shard, map_file
from data_tools.storage import Buffer, LocalStore, ObjectStore
from dpal.base.errors import DataError, StorageError
from dpal.base.progress import Progress

REJECTS = "rejects.jsonl"
BUILD = "build.json"
IN_MEMORY = 256 * 2**20  # a larger shard is put together in a temporary file


class ShardPlan(NamedTuple):
    """A shard to write.

    Attributes:
        name: object name.
        samples: what it holds, in order.
        extras: what a sample's JSON says beside the usual, by sample key.
    """

    name: str
    samples: Sequence[Sample]
    extras: Mapping[str, Mapping[str, Any]]


def plan_shards(
    samples: Sequence[Sample],
    samples_per_shard: int,
    prefix: str,
    extras: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[ShardPlan]:
    """Cut sorted samples into shards `<prefix>-000000.tar`, `<prefix>-000001.tar`, ..."""
    starts = range(0, len(samples), samples_per_shard)
    return [
        ShardPlan(
            f"{prefix}-{index:06d}.tar", samples[start : start + samples_per_shard], extras or {}
        )
        for index, start in enumerate(starts)
    ]


def published(store: ObjectStore) -> Manifest | None:
    """The manifest in `store`; None if there is none or it is damaged."""
    try:
        return load_manifest(store)
    except DataError:
        return None


def is_complete(store: ObjectStore, manifest: Manifest, fingerprint: str) -> bool:
    """Whether `manifest` was built from these very sources and all its shards are there."""
    try:
        record = json.loads(store.get(BUILD))
        if record != {"fingerprint": fingerprint, "manifest": manifest.digest}:
            return False
        return all(store.size(ref.name) == ref.num_bytes for ref in manifest.shards)
    except (DataError, ValueError):
        return False


def refuse_other_images(store: ObjectStore, manifest: Manifest, plans: list[ShardPlan]) -> None:
    """Raise DataError when `manifest` lists other samples than `plans`: caches may rely on it."""
    wanted = [(plan.name, keys_digest(s.key for s in plan.samples)) for plan in plans]
    if wanted != [(ref.name, ref.keys_digest) for ref in manifest.shards]:
        raise DataError(
            f"{store.url!r} already holds shards of other images or other data.* settings: "
            "choose another data.shards, or delete what is there first"
        )


def write_shards(
    sources: Sources,
    result: Survey,
    plans: list[ShardPlan],
    store: ObjectStore,
    *,
    prefix: str,
    fingerprint: str,
) -> Manifest:
    """Write what is missing of `plans` and publish the manifest, last.

    Args:
        fingerprint: of sources and policy; `is_complete` compares it on the next run.

    Raises:
        DataError: when a source file changed since it was surveyed.
        StorageError: when the store refuses or is full; nothing is published then.
    """
    if isinstance(store, LocalStore):
        store.sweep()
    present = set(store.list(prefix))
    refs: list[ShardRef] = []
    with Progress("shard", len(plans), "shard") as progress:
        for plan in plans:
            ref = _finished(plan, store) if plan.name in present else None
            refs.append(ref or _write(plan, sources, store))
            progress.advance()
    for name in present - {plan.name for plan in plans}:
        if re.fullmatch(rf"{prefix}-\d{{6}}\.tar", name):
            store.delete(name)  # left by an unpublished build of more images
    manifest = Manifest(tuple(refs), result.counts)
    write_rejects(store, result.rejects)
    build = {"fingerprint": fingerprint, "manifest": manifest.digest}
    store.put(BUILD, (json.dumps(build) + "\n").encode())
    store.put(MANIFEST, manifest.to_json().encode())
    for name in store.list(f"{SCAN_FOLDER}/"):
        store.delete(name)
    return manifest


def write_rejects(store: ObjectStore, rejects: Sequence[Reject]) -> None:
    """List every rejected file in `rejects.jsonl`: source, reason, detail."""
    rows = [json.dumps(reject._asdict()) + "\n" for reject in rejects]
    store.put(REJECTS, "".join(rows).encode())


def _write(plan: ShardPlan, sources: Sources, store: ObjectStore) -> ShardRef:
    data = _tar(plan, lambda index: _source_bytes(plan.samples[index], sources))
    store.put(plan.name, data)
    return _ref(plan, data)


def _finished(plan: ShardPlan, store: ObjectStore) -> ShardRef | None:
    """The shard's row if the stored bytes are exactly those that would be written."""
    if isinstance(store, LocalStore):
        data: Buffer = map_file(store.path(plan.name), plan.name)
    else:
        data = store.get(plan.name)
    ref = _ref(plan, data)
    try:
        shard = Shard(ref, data, plan.name)
        rebuilt = _tar(plan, shard.image_bytes)
    except DataError:
        return None
    return ref if _ref(plan, rebuilt) == ref else None


def _ref(plan: ShardPlan, data: Buffer) -> ShardRef:
    keys = [sample.key for sample in plan.samples]
    digest = hashlib.sha256(data).hexdigest()
    return ShardRef(plan.name, digest, len(data), len(keys), keys_digest(keys))


def _source_bytes(sample: Sample, sources: Sources) -> bytes:
    return sources.stores[sample.source].get(sample.name)


def _tar(plan: ShardPlan, image: Callable[[int], bytes]) -> Buffer:
    """The shard's bytes; `image(i)` gives the encoded image of sample i, checked by its key."""
    if sum(sample.size + 2048 for sample in plan.samples) <= IN_MEMORY:
        memory = io.BytesIO()
        _fill(memory, plan, image)
        return memory.getvalue()
    try:
        with tempfile.TemporaryFile() as file:
            _fill(file, plan, image)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StorageError(
            f"cannot write a temporary file in {tempfile.gettempdir()!r}: {error.strerror}"
        ) from None


def _fill(file: BinaryIO, plan: ShardPlan, image: Callable[[int], bytes]) -> None:
    from webdataset import TarWriter  # only now: it imports torch

    # Fixed owner, mode and time: only the samples decide the bytes.
    with TarWriter(file, encoder=False, mtime=0, mode=0o444, user="", group="") as writer:
        for index, sample in enumerate(plan.samples):
            contents = image(index)
            if hashlib.sha256(contents).hexdigest()[:KEY_DIGITS] != sample.key:
                raise DataError(f"image {sample.name!r} changed while it was sharded; run again")
            meta: dict[str, Any] = {
                "source": sample.name,
                "height": sample.height,
                "width": sample.width,
            }
            meta |= plan.extras.get(sample.key, {})
            text = json.dumps(meta, sort_keys=True).encode()
            writer.write({"__key__": sample.key, sample.kind: contents, "json": text})
