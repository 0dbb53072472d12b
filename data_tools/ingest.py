"""From sources to a survey: which images are kept, under which key, and what is rejected.

Every picture is read and decoded once, checked by the policy (data_tools/policy.py), and its items
are kept or listed with a reason. The result of each slice of items is stored in the destination,
so an interrupted survey goes on where it stopped. Memory does not grow with the number of items.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from threading import BoundedSemaphore

from data_tools.ledger import TRAIN, VALIDATION, Ledger
from data_tools.ledger_rows import Found
from data_tools.policy import Kept, Refused, Verdict, judge, settings
from data_tools.source import Item, Source
from data_tools.spool import Spool
from data_tools.storage import ObjectStore, is_remote
from dpal.base.errors import DataError
from dpal.base.inputs import Data
from dpal.base.progress import Progress

SCAN_FOLDER = "scan"
SLICE = 1024
REMOTE_THREADS = 16  # a thread that waits for a store does not compute


def list_items(sources: Sequence[Source], ledger: Ledger) -> str:
    """Enter every item of all sources, by name; return their digest.

    The digest covers names, sizes and versions: it is equal while no source was touched.

    Raises:
        DataError: for a source that is missing, damaged or empty.
    """
    digest = hashlib.sha256()

    def told(found: Found) -> Found:
        digest.update(_row(found, sources))
        return found

    ledger.add_items(map(told, _merged(sources)))
    return digest.hexdigest()[:32]


def survey(sources: Sequence[Source], ledger: Ledger, data: Data, scratch: ObjectStore) -> None:
    """Read and judge every item of `ledger`, and settle which are kept.

    Args:
        scratch: where the results of finished slices are kept.

    Raises:
        DataError: when there is no image at all.
    """
    num_threads = _num_threads(sources)
    judge_all = _Judge(sources, data, ledger.spool)
    with (
        ThreadPoolExecutor(num_threads) as pool,
        Progress("check", ledger.num_items, "image") as progress,
    ):
        for first, found in ledger.slices(SLICE):
            verdicts = _judge_slice(found, sources, data, scratch, pool, judge_all)
            parts = [part_of(verdict, data) for verdict in verdicts]
            ledger.add_verdicts(first, found, verdicts, parts)
            progress.advance(len(found))
    ledger.keep_each_key_once()
    if data.near_duplicates:
        ledger.drop_alike(data.near_duplicates)
    counts = dict(ledger.counts)
    if not ledger.num_samples() and set(counts) <= {"not_image"}:
        names = ", ".join(repr(source.url) for source in sources)
        raise DataError(
            f"no image among {ledger.num_items} files of {names}: accepted are JPEG and PNG"
        )


def part_of(verdict: Verdict, data: Data) -> int:
    """TRAIN or VALIDATION: a pure function of the identity, of the key where there is none.

    So new images move nobody, and an identity is never in both.
    """
    if not data.validation_fraction or isinstance(verdict, Refused):
        return TRAIN
    identity = json.loads(verdict.facts).get("identity") if verdict.facts else None
    name = f"key {verdict.key}" if identity is None else f"identity {identity}"
    place = int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13  # [0, 1)
    return VALIDATION if place < data.validation_fraction else TRAIN


def check_rejects(ledger: Ledger, data: Data, listed_in: str) -> None:
    """Raise DataError when more items are rejected than `data.max_reject_fraction` allows.

    Near duplicates do not count: nothing is wrong with them, and they were asked for.
    """
    unwanted = ("not_image", "near_duplicate")
    rejected = sum(count for reason, count in ledger.counts if reason not in unwanted)
    kept = ledger.num_samples()
    images = rejected + kept + dict(ledger.counts).get("near_duplicate", 0)
    if kept and rejected <= data.max_reject_fraction * images:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in ledger.counts)
    raise DataError(
        f"{rejected} of {images} images are rejected ({counts}), accepted is a share of "
        f"data.max_reject_fraction={data.max_reject_fraction:g} and at least one good image; "
        f"each is listed in {listed_in!r}"
    )


def _merged(sources: Sequence[Source]) -> Iterator[Found]:
    """All items by name, then by the source's URL, whatever order the sources are given in."""

    def of(index: int, source: Source) -> Iterator[Found]:
        items = iter(source.items())
        first = next(items, None)
        if first is None:
            raise DataError(f"{source.url!r} is empty: accepted are folders and lists of images")
        return (Found(index, item) for item in chain([first], items))

    return heapq.merge(
        *(of(index, source) for index, source in enumerate(sources)),
        key=lambda found: (found.item.name, sources[found.source].url),
    )


class _Judge:
    """Reads a picture and judges its items; many threads may read, as many as cores decode."""

    def __init__(self, sources: Sequence[Source], data: Data, spool: Spool) -> None:
        self._sources, self._data, self._spool = sources, data, spool
        self._decoding = BoundedSemaphore(_num_cores())  # a decoded picture may be large

    def __call__(self, group: Sequence[Found]) -> list[Verdict]:
        """Verdicts on the items of one picture."""
        first, source = group[0].item, self._sources[group[0].source]
        refused = self._unread(first)
        if refused is not None:
            return [refused] * len(group)
        try:
            contents = source.read(first.picture)
        except DataError:
            return [Refused("unreadable", "gone since it was listed")] * len(group)
        spare = b"" if is_remote(source.url) else contents  # a local file is read again

        def keep(key: str, sample: bytes) -> None:
            if sample is not spare:
                self._spool.add(key, sample)

        with self._decoding:
            return judge(contents, [one.item for one in group], self._data, keep)

    def _unread(self, item: Item) -> Refused | None:
        """Why a picture is refused before it is read."""
        largest = 8 * self._data.max_pixels + 2**20  # 16 bit RGBA, stored without compression
        if item.size < 0:
            return Refused("unreadable", "a dead link or not a regular file")
        if item.size > largest:
            return Refused("too_large", f"{item.size} bytes, more than data.max_pixels can need")
        return None


def _judge_slice(
    found: Sequence[Found],
    sources: Sequence[Source],
    data: Data,
    scratch: ObjectStore,
    pool: ThreadPoolExecutor,
    judge_all: _Judge,
) -> list[Verdict]:
    """Verdicts in the order of `found`, from an earlier run where there is one."""
    digest = hashlib.sha256(settings(data).encode())
    for one in found:
        digest.update(_row(one, sources))
    name = f"{SCAN_FOLDER}/{digest.hexdigest()[:32]}.jsonl"
    if scratch.exists(name):
        stored = _parse_verdicts(scratch.get(name).decode(errors="replace"))
        if len(stored) == len(found):
            return stored
    groups = [list(group) for _place, group in groupby(found, _picture)]
    verdicts = list(chain.from_iterable(pool.map(judge_all, groups)))
    if len(found) == SLICE and any(isinstance(verdict, Kept) for verdict in verdicts):
        rows = [json.dumps([type(verdict).__name__, *verdict]) for verdict in verdicts]
        scratch.put(name, ("\n".join(rows) + "\n").encode())
    return verdicts


def _picture(found: Found) -> tuple[int, str]:
    return found.source, found.item.picture


def _row(found: Found, sources: Sequence[Source]) -> bytes:
    """One line for the digest of items."""
    item = found.item
    row = [sources[found.source].url, item.name, item.size, item.version]
    if item.box is not None:
        row.append(json.dumps(item.box))
    return json.dumps(row).encode() + b"\n"


def _parse_verdicts(text: str) -> list[Verdict]:
    verdicts: list[Verdict] = []
    try:
        for line in text.splitlines():
            kind, *fields = json.loads(line)
            verdicts.append(Kept(*fields) if kind == "Kept" else Refused(*fields))
    except (ValueError, TypeError, RecursionError):
        return []
    return verdicts


def _num_threads(sources: Iterable[Source]) -> int:
    remote = any(is_remote(source.url) for source in sources)
    return max(_num_cores(), REMOTE_THREADS) if remote else _num_cores()


def _num_cores() -> int:
    return min(len(os.sched_getaffinity(0)), 16)
