"""Verb `audit`: verify what lies at a URL and name every damaged object.

At the URL and up to three folders below it, three things are known: data sets of shards (by their
manifest), caches of targets (by their header), and tars that neither of them lists.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from data_tools.audit import Finding, audit_shards
from data_tools.feature_cache import HEADER
from data_tools.ingest import SCAN_FOLDER
from data_tools.manifest import MANIFEST, load_manifest
from data_tools.shard_writer import BUILD
from data_tools.storage import SourceStore, open_store
from data_tools.tar_audit import audit_tars
from data_tools.target_audit import audit_targets
from dpal.base.errors import EXIT_DONE, DataError
from dpal.base.inputs import Storage

DEPTH = 3  # folders below the URL: of a run, its shards and their backgrounds, its caches


@dataclass(frozen=True)
class Audited:
    """One of the things that lie at a URL.

    Attributes:
        folder: below the URL; empty for the URL itself.
        kind: what it is.
        detail: how much of it there is.
        findings: what is wrong, with names below the URL.
    """

    folder: str
    kind: str
    detail: str
    findings: tuple[Finding, ...] = ()


def run_audit(url: str, storage: Storage, *, decode: bool = False, as_json: bool = False) -> int:
    """Print every damaged, missing or unexpected object of `url`; return 0 if there is none.

    Args:
        decode: decode every image, too.
        as_json: print one JSON object instead of lines.

    Raises:
        DataError: with the number of findings, or when there is nothing to audit.
    """
    names = open_store(url, storage).list()
    audited = [
        _named(_audit(folder, kind, names, url, storage, decode)) for folder, kind in _known(names)
    ]
    if not audited:
        raise DataError(
            f"nothing to audit in {url!r}: neither {MANIFEST} nor {HEADER} nor a tar is there or "
            f"up to {DEPTH} folders below"
        )
    findings = [finding for one in audited for finding in one.findings]
    if as_json:
        print(_as_json(url, audited))
    for finding in () if as_json else findings:
        print(finding)
    if findings:
        objects = {finding.name.partition("#")[0] for finding in findings}
        raise DataError(f"{len(objects)} of the objects in {url!r} are not as they should be")
    if not as_json:
        for one in audited:
            print(f"{one.folder or '.'}: {one.kind}, {one.detail}")
        print(f"{url}: all objects are as they should be ({len(audited)} data sets)")
    return EXIT_DONE


def _known(names: Iterable[str]) -> list[tuple[str, str]]:
    """Folders that hold something to audit, with what marks it: an object's name, or `.tar`."""
    marked, tars = [], set()
    for name in names:
        folder, _slash, last = name.rpartition("/")
        if folder.count("/") + bool(folder) > DEPTH:
            continue
        above, _slash, own = folder.rpartition("/")
        if own == "ledger" and last.endswith(".json"):
            marked.append((above, HEADER))  # a cache, even if its header is lost
        if last in (MANIFEST, HEADER):
            marked.append((folder, last))
        elif last.endswith(".tar"):
            tars.add(folder)
    inside = tuple(f"{folder}/" if folder else "" for folder, _marker in marked)
    stray = [(folder, ".tar") for folder in tars if not f"{folder}/".startswith(inside)]
    return sorted([*dict.fromkeys(marked)] + (stray if "" not in inside else []))


def _audit(
    folder: str, kind: str, names: list[str], url: str, storage: Storage, decode: bool
) -> Audited:
    store = open_store(f"{url.rstrip('/')}/{folder}".rstrip("/"), storage)
    start = f"{folder}/" if folder else ""
    below = [name.removeprefix(start) for name in names if name.startswith(start)]
    if kind == HEADER:
        found = audit_targets(store)
        rows = sum(name.startswith("ledger/") for name in below)
        return Audited(folder, "targets", f"{rows} ledger rows", tuple(found))
    if kind == MANIFEST:
        nested = tuple(
            f"{name.rpartition('/')[0]}/"
            for name in below
            if name.endswith((f"/{MANIFEST}", f"/{HEADER}"))
        )
        found = audit_shards(store, nested=nested, decode=decode)
        return Audited(folder, "shards", _size_of(store), tuple(found))
    return _audit_tars(folder, store, below, decode)


def _audit_tars(folder: str, store: SourceStore, below: list[str], decode: bool) -> Audited:
    tars = sorted(name for name in below if name.endswith(".tar") and "/" not in name)
    found = audit_tars(store, tars, decode=decode)
    findings = found.findings
    if BUILD in below or any(name.startswith(f"{SCAN_FOLDER}/") for name in below):
        problem = "sharding was begun and has not published its manifest"
        findings = [Finding(MANIFEST, problem, "run `dpal shard` again"), *findings]
    detail = f"{len(tars)} tars with {found.num_images} images in {found.num_members} files"
    for reason, count in sorted(found.left_out.items()):
        detail += f", {count} passed over ({reason})"
    detail += "; `dpal shard` reads them as data.images"
    return Audited(folder, "tars without a manifest", detail, tuple(findings))


def _size_of(store: SourceStore) -> str:
    try:
        manifest = load_manifest(store)
    except DataError:
        return "unknown"
    return f"{manifest.num_samples} samples in {len(manifest.shards)} shards"


def _named(one: Audited) -> Audited:
    """The same, with names below the URL instead of below the folder."""
    start = f"{one.folder}/" if one.folder else ""
    findings = tuple(found._replace(name=start + found.name) for found in one.findings)
    return replace(one, findings=findings)


def _as_json(url: str, audited: list[Audited]) -> str:
    sets = [{**asdict(one), "findings": [f._asdict() for f in one.findings]} for one in audited]
    return json.dumps({"url": url, "data_sets": sets}, indent=1)
