"""Auditing shards: every object against the manifest, and whatever is there besides.

Shards are read by several threads at once; what is found comes in the order of the manifest.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import NamedTuple, TypeVar

from data_tools.decode import decode_rgb
from data_tools.ingest import SCAN_FOLDER
from data_tools.manifest import MANIFEST, Manifest, ShardRef, load_manifest
from data_tools.salvage import salvage_shard
from data_tools.shard import DamagedShard, Shard, read_shard
from data_tools.shard_writer import BUILD, REJECTS
from data_tools.storage import LocalStore, ObjectStore
from dpal.base.errors import DataError
from dpal.base.inputs import Data
from dpal.base.progress import Progress

NESTED = ("backgrounds/", "scenes/", "validation/")
SHARD_AGAIN = "delete it and run `dpal shard` again"
REMOTE_THREADS = 8  # each holds a shard in memory
MAX_NAMED = 20  # damaged samples of one shard that are named one by one

T = TypeVar("T")


class Finding(NamedTuple):
    """One damaged, missing or unexpected object.

    Attributes:
        name: object name below the audited URL; with `#key` behind it for one sample.
        problem: what is wrong with it.
        mend: what mends it.
    """

    name: str
    problem: str
    mend: str = ""

    def __str__(self) -> str:
        # Names in tars that others wrote may hold bytes that are no text, or steer a terminal.
        name = self.name if self.name.isprintable() else repr(self.name)[1:-1]
        return f"{name}: {self.problem}" + (f"; {self.mend}" if self.mend else "")


def audit_shards(
    store: ObjectStore, *, nested: tuple[str, ...] = NESTED, decode: bool = False
) -> list[Finding]:
    """Every deviation of `store` from its manifest; empty when all is well. Reads all shards.

    Args:
        nested: prefixes of other data sets below this one, which have manifests of their own.
        decode: also decode every image.
    """
    try:
        manifest = load_manifest(store)
    except DataError as error:
        return [Finding(MANIFEST, str(error), "run `dpal shard` to its end")]
    present = {name for name in store.list() if not name.startswith(nested)}

    def audit(ref: ShardRef) -> list[Finding]:
        if ref.name not in present:
            return [Finding(ref.name, "missing", "run `dpal shard` again")]
        return _audit_shard(store, ref, decode)

    findings = audit_each(manifest.shards, audit, store)
    return findings + _extras(present, manifest)


def audit_each(
    items: Sequence[T], audit: Callable[[T], list[Finding]], store: ObjectStore
) -> list[Finding]:
    """What `audit` finds in each of the items, in their order; several at once, with progress."""
    num_threads = (os.cpu_count() or 1) if isinstance(store, LocalStore) else REMOTE_THREADS
    found = 0
    with (
        Progress("audit", len(items), "shard") as progress,
        ThreadPoolExecutor(num_threads, thread_name_prefix="audit") as pool,
    ):
        futures: list[Future[list[Finding]]] = [pool.submit(audit, item) for item in items]
        try:
            for future in as_completed(futures):
                found += len(future.result())
                progress.advance(1, f"{found} findings")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [finding for future in futures for finding in future.result()]


def audit_images(shard: Shard, name: str, mend: str, *, decode: bool) -> list[Finding]:
    """Samples of a shard whose JSON, or whose image with `decode`, is damaged."""
    findings: list[Finding] = []
    limit = Data.model_fields["max_pixels"].default
    for row, key in enumerate(shard.keys):
        try:
            shard.meta(row)
            if decode:
                decode_rgb(shard.image_bytes(row), limit)
        except DataError as error:
            findings.append(Finding(f"{name}#{key}", str(error), mend))
    return shortened(findings, name)


def shortened(findings: list[Finding], name: str) -> list[Finding]:
    """At most `MAX_NAMED` findings of one shard, and one that counts the rest."""
    more = len(findings) - MAX_NAMED
    if more <= 0:
        return findings
    rest = f"{more} more of its samples are damaged"
    return [*findings[:MAX_NAMED], Finding(name, rest, findings[0].mend)]


def _audit_shard(store: ObjectStore, ref: ShardRef, decode: bool) -> list[Finding]:
    size = store.size(ref.name)
    if size != ref.num_bytes:
        problem = f"wrong size: {size} bytes, the manifest says {ref.num_bytes}"
        return [Finding(ref.name, problem, SHARD_AGAIN)]
    try:
        shard = read_shard(store, ref, None)
    except DamagedShard as error:
        return [Finding(ref.name, f"{error} ({_salvaged(store, ref)})", SHARD_AGAIN)]
    except DataError as error:
        return [Finding(ref.name, str(error), SHARD_AGAIN)]
    return audit_images(shard, ref.name, SHARD_AGAIN, decode=decode)


def _salvaged(store: ObjectStore, ref: ShardRef) -> str:
    """What a run that may skip samples could still use of a shard."""
    try:
        shard = salvage_shard(store, ref)
    except DataError:
        return "none of its samples can be found"
    sound = 0
    for row in range(len(shard)):
        try:
            shard.image_bytes(row)
            sound += 1
        except DataError:
            continue
    return f"{sound} of its {len(shard)} images are sound"


def _extras(present: set[str], manifest: Manifest) -> list[Finding]:
    known = {MANIFEST, REJECTS, BUILD, *(ref.name for ref in manifest.shards)}
    return [
        Finding(name, "not listed in the manifest", "delete it if it is not yours to keep")
        for name in sorted(present - known)
        if not name.startswith(f"{SCAN_FOLDER}/")
    ]
