"""Auditing a target cache: every tar against its ledger row, and whatever is there besides."""

import hashlib

from data_tools.audit import Finding, audit_each
from data_tools.covariance import COVARIANCE
from data_tools.feature_cache import HEADER, LedgerRow, TargetCache
from data_tools.software import MADE_WITH
from data_tools.storage import ObjectStore
from data_tools.target_tar import TargetShard
from dpal.base.errors import DataError
from dpal.targets.header import TargetHeader

MEND = "delete it and its ledger row, then run `dpal cache` again"
MEND_ROW = "delete it, then run `dpal cache` again"


def audit_targets(store: ObjectStore) -> list[Finding]:
    """Every deviation of a `targets-<digest>/` folder from its ledger. Reads all tars."""
    try:
        cache = TargetCache(store, TargetHeader.from_json(store.get(HEADER)))
    except DataError as error:
        return [Finding(HEADER, str(error), "delete the folder, then run `dpal cache` again")]
    names = set(store.list())
    ledger = sorted(name for name in names if name.startswith("ledger/"))
    findings = _covariance_findings(cache) if COVARIANCE in names else []
    known = {HEADER, COVARIANCE, MADE_WITH, *ledger}

    def audit(name: str) -> list[Finding]:
        try:
            row = LedgerRow.from_json(store.get(name), f"{store.url}/{name}")
        except DataError as error:
            return [Finding(name, str(error), MEND_ROW)]
        found = []
        for series in row.series:
            tar = f"{series}/{row.shard}"
            known.add(tar)
            problem = _problem(cache, row, series, tar) if tar in names else "missing"
            if problem:
                found.append(Finding(tar, problem, MEND))
        return found

    findings += audit_each(ledger, audit, store)
    return findings + [
        Finding(name, "no ledger row lists it", "run `dpal cache` to its end")
        for name in sorted(names - known)
    ]


def _covariance_findings(cache: TargetCache) -> list[Finding]:
    """A cache made before PHI-S may lack the object; one that is there must be whole."""
    try:
        cache.covariance()
    except DataError as error:
        return [Finding(COVARIANCE, str(error), MEND_ROW)]
    return []


def _problem(cache: TargetCache, row: LedgerRow, series: str, tar: str) -> str:
    data = cache.store.get(tar)
    expected = row.series[series]
    if len(data) != expected.num_bytes:
        return f"wrong size: {len(data)} bytes, the ledger says {expected.num_bytes}"
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        return "its checksum is not the ledger's"
    try:
        shard = TargetShard(data, cache.layout(series), tar)
        shard.records(range(len(shard)))
    except DataError as error:
        return str(error)
    return "" if len(shard) == row.num_samples else f"{len(shard)} records for {row.num_samples}"
