"""Auditing shards: every object against the manifest, and whatever is there besides."""

from typing import NamedTuple

from data_tools.ingest import SCAN_FOLDER
from data_tools.manifest import MANIFEST, Manifest, ShardRef, load_manifest
from data_tools.shard import read_shard
from data_tools.shard_writer import BUILD, REJECTS
from data_tools.storage import ObjectStore
from dpal.base.errors import DataError
from dpal.base.progress import Progress


class Finding(NamedTuple):
    """One damaged, missing or unexpected object.

    Attributes:
        name: object name below the audited URL.
        problem: what is wrong with it, and what mends it.
    """

    name: str
    problem: str


def audit_shards(
    store: ObjectStore, *, nested: tuple[str, ...] = ("backgrounds/", "scenes/", "validation/")
) -> list[Finding]:
    """Every deviation of `store` from its manifest; empty when all is well. Reads all shards.

    Args:
        nested: prefixes of other data sets below this one, which have manifests of their own.
    """
    try:
        manifest = load_manifest(store)
    except DataError as error:
        return [Finding(MANIFEST, str(error))]
    present = {name for name in store.list() if not name.startswith(nested)}
    findings: list[Finding] = []
    with Progress("audit", len(manifest.shards), "shard") as progress:
        for ref in manifest.shards:
            problem = _problem(store, ref) if ref.name in present else "missing"
            if problem:
                findings.append(Finding(ref.name, f"{problem}; delete it and shard again"))
            progress.advance(1, f"{len(findings)} findings")
    return findings + _extras(present, manifest)


def _problem(store: ObjectStore, ref: ShardRef) -> str:
    size = store.size(ref.name)
    if size != ref.num_bytes:
        return f"wrong size: {size} bytes, the manifest says {ref.num_bytes}"
    try:
        shard = read_shard(store, ref, None)
        for index in range(len(shard)):
            shard.meta(index)
    except DataError as error:
        return str(error)
    return ""


def _extras(present: set[str], manifest: Manifest) -> list[Finding]:
    known = {MANIFEST, REJECTS, BUILD, *(ref.name for ref in manifest.shards)}
    return [
        Finding(name, "not listed in the manifest")
        for name in sorted(present - known)
        if not name.startswith(f"{SCAN_FOLDER}/")
    ]
