"""Auditing a target cache: every tar against its ledger row, and whatever is there besides."""

import hashlib

from data_tools.audit import Finding, audit_each
from data_tools.covariance import COVARIANCE
from data_tools.feature_cache import HEADER, LedgerRow, TargetCache, row_name
from data_tools.manifest import keys_digest
from data_tools.software import MADE_WITH
from data_tools.storage import ObjectStore
from data_tools.target_tar import TargetShard
from dpal.base.errors import DataError
from dpal.targets.header import TargetHeader

MEND = "delete it and its ledger row, then run `dpal cache` again"
MEND_ROW = "delete it, then run `dpal cache` again"


def audit_targets(store: ObjectStore) -> list[Finding]:
    """Every deviation of a `targets-<digest>/` folder from its ledger. Reads all tars."""
    names = set(store.list())
    if HEADER not in names:
        return [Finding(HEADER, "missing", "run `dpal cache` again")]
    try:
        cache = TargetCache(store, TargetHeader.from_json(store.get(HEADER), "it"))
    except DataError as error:
        return [Finding(HEADER, str(error))]
    ledger = sorted(name for name in names if name.startswith("ledger/"))
    findings = _covariance_findings(cache) if COVARIANCE in names else []
    known = {HEADER, COVARIANCE, MADE_WITH, *ledger}

    def audit(name: str) -> list[Finding]:
        try:
            row = LedgerRow.from_json(store.get(name), f"{store.url}/{name}")
        except DataError as error:
            return [Finding(name, str(error), MEND_ROW)]
        found = [Finding(name, problem, MEND_ROW) for problem in _row_problems(cache, row, name)]
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


def _row_problems(cache: TargetCache, row: LedgerRow, name: str) -> list[str]:
    """What is wrong with a row that can be read."""
    problems = []
    if row_name(row.shard) != name:
        problems.append(f"it is the row of shard {row.shard!r}")
    views = cache.header.definition.views
    counts = {"view": views.get("count", 0), "composite": views.get("composites", 0)}
    wanted = {f"{kind}-{index}" for kind, count in counts.items() for index in range(count)}
    problems += [f"it lacks {series!r}" for series in sorted(wanted - set(row.series))]
    return problems


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
    if len(shard) != row.num_samples:
        return f"{len(shard)} records for {row.num_samples}"
    return "" if keys_digest(shard.keys) == row.keys_digest else "it is of other samples"
