"""Verb `audit`: verify what lies at a URL and name every damaged object."""

from collections.abc import Callable

from data_tools.audit import Finding, audit_shards
from data_tools.feature_cache import HEADER
from data_tools.manifest import MANIFEST
from data_tools.storage import ObjectStore, open_store
from data_tools.target_audit import audit_targets
from dpal.base.errors import EXIT_DONE, DataError
from dpal.base.inputs import Storage

Auditor = Callable[[ObjectStore], list[Finding]]

# What may lie at a URL, told by the object that marks it.
AUDITORS: dict[str, Auditor] = {MANIFEST: audit_shards, HEADER: audit_targets}


def run_audit(url: str, storage: Storage) -> int:
    """Print every damaged, missing or unexpected object of `url`; return 0 if there is none.

    Data sets below the URL (`backgrounds/`, `targets-<digest>/`) are audited too.

    Raises:
        DataError: with the number of findings, or when there is nothing to audit.
    """
    findings: list[str] = []
    audited = _marked(url, storage)
    for folder, marker in audited:
        store = open_store(f"{url.rstrip('/')}/{folder}".rstrip("/"), storage)
        for finding in AUDITORS[marker](store):
            findings.append(f"{folder}{'/' if folder else ''}{finding.name}")
            print(f"{findings[-1]}: {finding.problem}")
    if not audited:
        markers = ", ".join(sorted(AUDITORS))
        raise DataError(
            f"nothing to audit in {url!r}: none of {markers} is there or one level below"
        )
    if findings:
        raise DataError(f"{len(findings)} of the objects in {url!r} are not as they should be")
    print(f"{url}: all objects are as they should be ({len(audited)} data sets)")
    return EXIT_DONE


def _marked(url: str, storage: Storage) -> list[tuple[str, str]]:
    """Folders at `url` and one level below that hold a marker, with the marker."""
    names = open_store(url, storage).list()
    folders = sorted({""} | {name.split("/")[0] for name in names if name.count("/") >= 1})
    present = set(names)
    return [
        (folder, marker)
        for folder in folders
        for marker in AUDITORS
        if f"{folder}/{marker}".lstrip("/") in present
    ]
