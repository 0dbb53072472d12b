"""Writing shards: the same samples always give the same bytes, and what is finished is kept.

Samples are sorted by key and cut into shards; a shard that already holds exactly the bytes it
should hold is not written again. Several are written at once. The manifest is published last.
"""

import hashlib
import io
import json
import mmap
import os
import re
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, BinaryIO, NamedTuple

from data_tools.ingest import SCAN_FOLDER
from data_tools.ledger_rows import Reject, Sample
from data_tools.manifest import MANIFEST, Manifest, ShardRef, keys_digest, load_manifest
from data_tools.policy import key_of
from data_tools.shard import Shard, map_file
from data_tools.storage import Buffer, LocalStore, ObjectStore, is_remote
from dpal.base.errors import DataError, StorageError
from dpal.base.progress import Progress

REJECTS = "rejects.jsonl"
BUILD = "build.json"
IN_MEMORY = 32 * 2**20  # a larger shard is put together in a temporary file
REMOTE_WRITERS = 8  # shards at once, to or from a store; locally one for each core

Reader = Callable[[Sample], bytes]


class ShardPlan(NamedTuple):
    """A shard to write.

    Attributes:
        name: object name.
        samples: what it holds, in order.
    """

    name: str
    samples: Sequence[Sample]


class ShardSet(NamedTuple):
    """A data set to write.

    Attributes:
        prefix: first word of the shards' names.
        num_shards: how many there will be.
        rejected: number of rejects by reason.
        fingerprint: of sources and policy; `is_complete` compares it on the next run.
        said: what every sample's JSON says unless its own facts say otherwise.
    """

    prefix: str
    num_shards: int
    rejected: tuple[tuple[str, int], ...]
    fingerprint: str
    said: Mapping[str, Any]


def plan_shards(chunks: Iterable[Sequence[Sample]], prefix: str) -> Iterator[ShardPlan]:
    """Shards `<prefix>-000000.tar`, `<prefix>-000001.tar`, ... of one chunk of samples each."""
    for index, samples in enumerate(chunks):
        yield ShardPlan(f"{prefix}-{index:06d}.tar", samples)


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
    except (DataError, ValueError, RecursionError):
        return False


def refuse_other_images(store: ObjectStore, manifest: Manifest, plans: Iterable[ShardPlan]) -> None:
    """Raise DataError when `manifest` lists other samples than `plans`: caches may rely on it."""
    wanted = ((plan.name, keys_digest(s.key for s in plan.samples)) for plan in plans)
    there = ((ref.name, ref.keys_digest) for ref in manifest.shards)
    if any(one != other for one, other in zip_longest(wanted, there)):
        raise DataError(
            f"{store.url!r} already holds shards of other images or other data.* settings: "
            "choose another data.shards, or delete what is there first"
        )


def write_shards(
    what: ShardSet,
    plans: Iterable[ShardPlan],
    rejects: Iterable[Reject],
    store: ObjectStore,
    read: Reader,
    *,
    num_writers: int = 1,
) -> Manifest:
    """Write what is missing of `plans` and publish the manifest, last.

    Args:
        read: gives a sample's bytes; called from several threads.
        num_writers: shards that are put together and sent at once.

    Raises:
        DataError: when a source file changed since it was surveyed.
        StorageError: when the store refuses or is full; nothing is published then.
    """
    if isinstance(store, LocalStore):
        store.sweep()
    present = set(store.list(what.prefix))
    refs: list[ShardRef] = []

    def settle(plan: ShardPlan) -> ShardRef:
        ref = _finished(plan, what.said, store) if plan.name in present else None
        return ref or _write(plan, what.said, store, read)

    with Progress("shard", what.num_shards, "shard") as progress:
        for ref in _in_order(settle, plans, num_writers):
            refs.append(ref)
            progress.advance()
    for name in present - {ref.name for ref in refs}:
        if re.fullmatch(rf"{what.prefix}-\d{{6}}\.tar", name):
            store.delete(name)  # left by an unpublished build of more images
    manifest = Manifest(tuple(refs), what.rejected)
    write_rejects(store, rejects)
    build = {"fingerprint": what.fingerprint, "manifest": manifest.digest}
    store.put(BUILD, (json.dumps(build) + "\n").encode())
    store.put(MANIFEST, manifest.to_json().encode())
    for name in store.list(f"{SCAN_FOLDER}/"):
        store.delete(name)
    return manifest


def write_rejects(store: ObjectStore, rejects: Iterable[Reject]) -> None:
    """List every rejected item in `rejects.jsonl`: source, reason, detail."""

    def fill(file: BinaryIO) -> None:
        for reject in rejects:
            file.write((json.dumps(reject._asdict()) + "\n").encode())

    store.put(REJECTS, _gathered(fill, IN_MEMORY + 1))  # there may be millions


def num_writers(urls: Iterable[str]) -> int:
    """Shards to write at once between these places."""
    num_cores = min(len(os.sched_getaffinity(0)), REMOTE_WRITERS)
    return REMOTE_WRITERS if any(map(is_remote, urls)) else num_cores


def _in_order(
    settle: Callable[[ShardPlan], ShardRef], plans: Iterable[ShardPlan], num_writers: int
) -> Iterator[ShardRef]:
    """Results in the order of `plans`, of which no more are taken than are worked on."""
    pending: deque[Future[ShardRef]] = deque()
    with ThreadPoolExecutor(num_writers) as pool:
        try:
            for plan in plans:
                pending.append(pool.submit(settle, plan))
                if len(pending) > num_writers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _write(plan: ShardPlan, said: Mapping[str, Any], store: ObjectStore, read: Reader) -> ShardRef:
    data = _tar(plan, said, lambda index: read(plan.samples[index]))
    store.put(plan.name, data)
    return _ref(plan, data)


def _finished(plan: ShardPlan, said: Mapping[str, Any], store: ObjectStore) -> ShardRef | None:
    """The shard's row if the stored bytes are exactly those that would be written."""
    if isinstance(store, LocalStore):
        data: Buffer = map_file(store.path(plan.name), plan.name)
    else:
        data = store.get(plan.name)
    ref = _ref(plan, data)
    try:
        shard = Shard(ref, data, plan.name)
        rebuilt = _tar(plan, said, shard.image_bytes)
    except DataError:
        return None
    return ref if _ref(plan, rebuilt) == ref else None


def _ref(plan: ShardPlan, data: Buffer) -> ShardRef:
    keys = [sample.key for sample in plan.samples]
    digest = hashlib.sha256(data).hexdigest()
    return ShardRef(plan.name, digest, len(data), len(keys), keys_digest(keys))


def _tar(plan: ShardPlan, said: Mapping[str, Any], image: Callable[[int], bytes]) -> Buffer:
    """The shard's bytes; `image(i)` gives the encoded image of sample i, checked by its key."""
    length = sum(sample.size + len(sample.facts) + 2048 for sample in plan.samples)
    return _gathered(lambda file: _fill(file, plan, said, image), length)


def _gathered(fill: Callable[[BinaryIO], None], length: int) -> Buffer:
    """What `fill` writes, about `length` bytes: in memory, or in a temporary file if large."""
    if length <= IN_MEMORY:
        memory = io.BytesIO()
        fill(memory)
        return memory.getvalue()
    try:
        with tempfile.TemporaryFile() as file:
            fill(file)
            file.flush()
            if not file.tell():
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StorageError(
            f"cannot write a temporary file in {tempfile.gettempdir()!r}: {error.strerror}"
        ) from None


def _fill(
    file: BinaryIO, plan: ShardPlan, said: Mapping[str, Any], image: Callable[[int], bytes]
) -> None:
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in enumerate(plan.samples):
            contents = image(index)
            if key_of(contents) != sample.key:
                raise DataError(f"image {sample.name!r} changed while it was sharded; run again")
            meta = {**said, **(json.loads(sample.facts) if sample.facts else {})}
            meta |= {"source": sample.name, "height": sample.height, "width": sample.width}
            text = json.dumps(meta, sort_keys=True).encode()
            members = {sample.kind: contents, "json": text}
            for extension in sorted(members):
                _add(tar, f"{sample.key}.{extension}", members[extension])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member with fixed owner, mode and time: only the samples decide the bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), 0, 0o444
    tar.addfile(member, io.BytesIO(data))
