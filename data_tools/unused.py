"""What may go from a folder of target caches: those that nobody refers to, and orphaned tars."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from data_tools.covariance import COVARIANCE
from data_tools.dated import Dated
from data_tools.feature_cache import HEADER, row_name
from data_tools.software import MADE_WITH
from data_tools.storage import LocalStore, ObjectStore

FOLDER = re.compile(r"targets-(?P<digest>[0-9a-f]{16})")
ORPHAN_S = 24 * 3600.0  # a shard takes minutes: a tar without a row for a day has no writer
_LAST = (HEADER, MADE_WITH, COVARIANCE)  # what is left without a header is made anew


class CacheFolder(NamedTuple):
    """One `targets-<digest>/` folder.

    Attributes:
        name: of the folder.
        digest: hex digits in its name.
        objects: names below the folder.
        num_bytes: of all objects.
        written: when an object was last written, in seconds since 1970; 0 where nobody says.
        orphans: tars that no ledger row lists, at least a day old.
    """

    name: str
    digest: str
    objects: tuple[str, ...]
    num_bytes: int
    written: float
    orphans: tuple[Dated, ...]


def cache_folders(listing: Iterable[Dated], now: float) -> list[CacheFolder]:
    """Every cache in a listing of the URL that holds caches, in the order of their names.

    Args:
        now: seconds since 1970.
    """
    found: dict[str, list[Dated]] = {}
    for entry in listing:
        folder, _slash, name = entry.name.partition("/")
        if name and FOLDER.fullmatch(folder):
            found.setdefault(folder, []).append(entry._replace(name=name))
    return [_folder(name, entries, now) for name, entries in sorted(found.items())]


def delete_cache(store: ObjectStore, objects: Sequence[str]) -> None:
    """Delete a cache: its ledger first, then its tars, then its header and what that says.

    A kill in between leaves a cache that says itself what it lacks, so `dpal cache` fills it again;
    so does a job that is writing to it. What that adds meanwhile stays, but for promises of tars
    that are gone.

    Args:
        store: of the cache's folder.
        objects: everything in it.
    """
    rows = [name for name in objects if name.startswith("ledger/")]
    last = [name for name in _LAST if name in objects]
    between = [name for name in objects if name not in {*rows, *last}]
    for name in (*rows, *between):
        store.delete(name)
    _forget(store, between)
    for name in last:
        store.delete(name)
    if isinstance(store, LocalStore):
        _remove_folders(store)


def delete_orphans(store: ObjectStore, orphans: Sequence[Dated]) -> None:
    """Delete tars without a ledger row, but for those that have got one since they were listed.

    Args:
        store: of the cache's folder.
    """
    rows = set(store.list("ledger/"))
    gone = [orphan.name for orphan in orphans if _row_of(orphan.name) not in rows]
    for name in gone:
        store.delete(name)
    _forget(store, gone)


def _forget(store: ObjectStore, gone: Sequence[str]) -> None:
    """Delete the rows that were written while their tars were deleted (`publish_shard`)."""
    promised = {_row_of(name) for name in gone if name.endswith(".tar")}
    for row in store.list("ledger/"):
        if row in promised:
            store.delete(row)


def _row_of(tar: str) -> str:
    return row_name(tar.rpartition("/")[2])


def _folder(name: str, entries: list[Dated], now: float) -> CacheFolder:
    match = FOLDER.fullmatch(name)
    assert match is not None
    objects = tuple(entry.name for entry in entries)
    rows = {
        entry.removeprefix("ledger/").removesuffix(".json")
        for entry in objects
        if entry.startswith("ledger/")
    }
    orphans = tuple(
        entry
        for entry in entries
        if entry.name.endswith(".tar")
        and entry.name.rpartition("/")[2].removesuffix(".tar") not in rows
        and entry.written
        and now - entry.written > ORPHAN_S
    )
    return CacheFolder(
        name,
        match["digest"],
        objects,
        sum(max(0, entry.size) for entry in entries),
        max(entry.written for entry in entries),
        orphans,
    )


def _remove_folders(store: LocalStore) -> None:
    """Remove what is empty now; a folder that somebody is writing to stays."""
    store.sweep()
    folders = sorted((path for path in store.root.rglob("*") if path.is_dir()), reverse=True)
    for folder in (*folders, store.root):
        with suppress(OSError):
            folder.rmdir()
