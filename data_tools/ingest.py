"""From folders of files to a survey: which images are kept, under which key, and what is rejected.

Every file is read once, checked by the policy, and either kept or listed with a reason. The
result of each slice of files is stored, so an interrupted survey goes on where it stopped.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_tools.decode import decode_rgb, read_header, sniff
from data_tools.storage import Listed, LocalStore, ObjectStore, SourceStore, open_store
from dpal.base.errors import DataError
from dpal.base.inputs import Data, Storage
from dpal.base.progress import Progress

POLICY_VERSION = 1  # raise it whenever the same file would be judged otherwise
SCAN_FOLDER = "scan"
SLICE = 1024
KEY_DIGITS = 32

Reason = Literal["not_image", "unreadable", "undecodable", "undersized", "too_large", "duplicate"]
_IMAGE_NAMES = (".jpg", ".jpeg", ".png")


class Sample(NamedTuple):
    """One kept image.

    Attributes:
        key: first 32 hex digits of the SHA-256 of the file's bytes.
        name: file name below its source folder.
        source: index of that source.
        kind: `jpg` or `png`.
        size: bytes.
        height: pixels, upright.
        width: pixels, upright.
    """

    key: str
    name: str
    source: int
    kind: str
    size: int
    height: int
    width: int


class Reject(NamedTuple):
    """One file that is not kept, and why."""

    source: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Survey:
    """What the sources hold: samples sorted by key, each key once; rejects sorted by name."""

    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...]

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """Number of rejects by reason, sorted by reason."""
        return tuple(sorted(Counter(reject.reason for reject in self.rejects).items()))


class Found(NamedTuple):
    """One file of one source, before it is read."""

    source: int
    entry: Listed


@dataclass(frozen=True)
class Sources:
    """Source folders and the files in them, sorted by name, whatever order the folders have."""

    stores: tuple[SourceStore, ...]
    files: tuple[Found, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes and versions: equal while no source file was touched."""
        return _fingerprint(self.stores, self.files)

    def where(self, found: Found) -> str:
        """The file as a user would name it."""
        return f"{self.stores[found.source].url}/{found.entry.name}"


def list_sources(urls: Sequence[str], storage: Storage) -> Sources:
    """List every source folder. Raises DataError for one that is missing or empty."""
    stores = tuple(open_store(url, storage) for url in urls)
    files: list[Found] = []
    for index, store in enumerate(stores):
        entries = store.listing()
        if not entries:
            raise DataError(f"folder {store.url!r} is empty: accepted are folders of JPEG or PNG")
        files += [Found(index, entry) for entry in entries]
    files.sort(key=lambda found: (found.entry.name, stores[found.source].url))
    return Sources(stores, tuple(files))


def survey(sources: Sources, data: Data, scratch: ObjectStore) -> Survey:
    """Read and judge every file; the results of finished slices are kept in `scratch`.

    Raises:
        DataError: when there is no image at all.
    """
    samples: list[Sample] = []
    rejects: list[Reject] = []
    with (
        ThreadPoolExecutor(_num_threads()) as pool,
        Progress("check", len(sources.files), "file") as progress,
    ):
        for files in _slices(sources.files):
            for found, verdict in zip(
                files, _judge_slice(files, sources, data, scratch, pool), strict=True
            ):
                if isinstance(verdict, Reject):
                    rejects.append(verdict._replace(source=sources.where(found)))
                else:
                    samples.append(verdict._replace(source=found.source))
            progress.advance(len(files), f"{len(rejects)} rejected")
    if all(reject.reason == "not_image" for reject in rejects) and not samples:
        names = ", ".join(repr(store.url) for store in sources.stores)
        raise DataError(
            f"no image among {len(rejects)} files of {names}: accepted are JPEG and PNG"
        )
    return _without_duplicates(samples, rejects, sources)


def check_rejects(result: Survey, data: Data, listed_in: str) -> None:
    """Raise DataError when more files are rejected than `data.max_reject_fraction` allows."""
    rejected = sum(count for reason, count in result.counts if reason != "not_image")
    images = len(result.samples) + rejected
    if result.samples and rejected <= data.max_reject_fraction * images:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in result.counts)
    raise DataError(
        f"{rejected} of {images} images are rejected ({counts}), accepted is a share of "
        f"data.max_reject_fraction={data.max_reject_fraction:g} and at least one good image; "
        f"each is listed in {listed_in!r}"
    )


def judge(name: str, contents: bytes, data: Data) -> Sample | Reject:
    """The policy on one file: its sample, or why it is rejected (`source` is filled in later)."""
    if sniff(contents) is None:
        if name.lower().endswith(_IMAGE_NAMES):
            return Reject("", "undecodable", "called an image but neither JPEG nor PNG")
        return Reject("", "not_image", "neither JPEG nor PNG")
    try:
        header = read_header(contents)
        size = f"{header.width} x {header.height} pixels"
        if header.height * header.width > data.max_pixels:
            return Reject("", "too_large", f"{size}, data.max_pixels={data.max_pixels}")
        if min(header.height, header.width) < data.min_side:
            return Reject("", "undersized", f"{size}, data.min_side={data.min_side}")
        height, width, _channels = decode_rgb(contents, data.max_pixels).shape
    except DataError as error:
        return Reject("", "undecodable", str(error))
    key = hashlib.sha256(contents).hexdigest()[:KEY_DIGITS]
    return Sample(key, name, 0, header.kind, len(contents), height, width)


def _judge_slice(
    files: Sequence[Found],
    sources: Sources,
    data: Data,
    scratch: ObjectStore,
    pool: ThreadPoolExecutor,
) -> list[Sample | Reject]:
    """Verdicts in the order of `files`, from an earlier run where there is one."""
    policy = f"{POLICY_VERSION} {data.min_side} {data.max_pixels} "
    digest = _fingerprint(sources.stores, files, policy)
    name = f"{SCAN_FOLDER}/{digest}.jsonl"
    if scratch.exists(name):
        stored = _parse_verdicts(scratch.get(name).decode(errors="replace"))
        if len(stored) == len(files):
            return stored
    verdicts = list(pool.map(lambda found: _read_and_judge(found, sources, data), files))
    if len(files) == SLICE and any(isinstance(verdict, Sample) for verdict in verdicts):
        rows = [json.dumps([type(verdict).__name__, *verdict]) for verdict in verdicts]
        scratch.put(name, ("\n".join(rows) + "\n").encode())
    return verdicts


def _read_and_judge(found: Found, sources: Sources, data: Data) -> Sample | Reject:
    name, size = found.entry.name, found.entry.size
    if size < 0:
        return Reject("", "unreadable", "a dead link or not a regular file")
    largest = 8 * data.max_pixels + 2**20  # 16 bit RGBA, stored without compression
    if size > largest:
        return Reject("", "too_large", f"{size} bytes, more than data.max_pixels can need")
    store = sources.stores[found.source]
    try:
        return judge(name, store.get(name), data)
    except DataError:
        if isinstance(store, LocalStore):
            return Reject("", "unreadable", "gone since it was listed")
        raise


def _parse_verdicts(text: str) -> list[Sample | Reject]:
    verdicts: list[Sample | Reject] = []
    try:
        for line in text.splitlines():
            kind, *fields = json.loads(line)
            verdicts.append(Sample(*fields) if kind == "Sample" else Reject(*fields))
    except (ValueError, TypeError):
        return []
    return verdicts


def _without_duplicates(samples: list[Sample], rejects: list[Reject], sources: Sources) -> Survey:
    """Keep each key once, under the smallest name, so the order of folders changes nothing."""
    kept: list[Sample] = []

    def place(sample: Sample) -> str:
        return f"{sources.stores[sample.source].url}/{sample.name}"

    for sample in sorted(samples, key=lambda s: (s.key, s.name, place(s))):
        if kept and kept[-1].key == sample.key:
            rejects.append(Reject(place(sample), "duplicate", f"same bytes as {place(kept[-1])}"))
        else:
            kept.append(sample)
    return Survey(tuple(kept), tuple(sorted(rejects)))


def _fingerprint(stores: Sequence[SourceStore], files: Sequence[Found], salt: str = "") -> str:
    digest = hashlib.sha256(salt.encode())
    for source, entry in files:
        row = json.dumps([stores[source].url, *entry])
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()[:32]


def _slices(files: Sequence[Found]) -> Iterator[Sequence[Found]]:
    for start in range(0, len(files), SLICE):
        yield files[start : start + SLICE]


def _num_threads() -> int:
    return min(len(os.sched_getaffinity(0)), 16)
