"""The offline teacher cache: content-addressed folders of target tars, and a ledger.

    <url>/targets-<digest>/header.json  covariance.npy  made_with.json
                           view-<k>/<shard>.tar  composite-<k>/<shard>.tar
                           ledger/<shard>.json

The digest covers everything that decides the content, so the same input finds the same folder.
A shard counts as cached when its ledger row exists; the row is written last. Every object is
published by its first writer and never replaced while it is whole, so any number of jobs at once
end with one consistent cache.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

from data_tools.covariance import COVARIANCE, Matrix, covariance_bytes, read_covariance
from data_tools.local_cache import LocalCache
from data_tools.manifest import SHA256, Manifest, ShardRef, keys_digest
from data_tools.shard import map_file
from data_tools.software import MADE_WITH, read_software, software_bytes
from data_tools.storage import LocalStore, ObjectStore, open_store
from data_tools.target_tar import TargetShard
from data_tools.verified import Buffer, Content, fetch_verified
from dpal.base.errors import DataError
from dpal.base.inputs import Views
from dpal.base.recipe import Recipe
from dpal.base.telemetry import Telemetry
from dpal.record import Kind, RecordLayout
from dpal.targets.header import TargetDefinition, TargetHeader

HEADER = "header.json"
ROWS_KEPT = 4096
ROWS_AT_ONCE = 32
PUBLISHINGS = 3  # of a shard whose tars are deleted meanwhile
NEIGHBOURS = 20  # other caches that are looked at to tell what a missing one differs in


class SeriesRow(NamedTuple):
    """What a ledger row says of one series: checksum and size of its tar."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class LedgerRow:
    """One finished shard.

    Attributes:
        shard: name of the image shard.
        source_sha256: checksum of the image shard that the targets were made from.
        keys_digest: of its sample keys, in order.
        num_samples: records in each series.
        series: one entry for every series, e.g. `view-0`.
    """

    shard: str
    source_sha256: str
    keys_digest: str
    num_samples: int
    series: Mapping[str, SeriesRow]

    def to_json(self) -> bytes:
        """UTF-8 JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> "LedgerRow":
        """Read what `to_json` wrote; `where` names it in the DataError when it is damaged."""
        try:
            plain = json.loads(data)
            plain["series"] = {name: _series_row(*row) for name, row in plain["series"].items()}
            return LedgerRow(**plain)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(
                f"ledger row {where!r} is damaged; delete it and run `dpal cache` again"
            ) from None


class TargetCache:
    """One `targets-<digest>/` folder with a published header."""

    def __init__(self, store: ObjectStore, header: TargetHeader) -> None:
        self.store, self.header = store, header
        self._row = lru_cache(ROWS_KEPT)(self._read_row)
        # Every series of a shard asks for its row, all at once: the first one reads it.
        self._reading = tuple(threading.Lock() for _ in range(ROWS_AT_ONCE))

    @staticmethod
    def open(store: ObjectStore, definition: TargetDefinition) -> "TargetCache":
        """The cache in `store`.

        Raises:
            DataError: without a header, or naming the fields in which it is of something else.
        """
        if not store.exists(HEADER):
            raise DataError(f"no target cache in {store.url!r}: run `dpal cache` first")
        header = TargetHeader.from_json(store.get(HEADER), f"target header {store.url}/{HEADER}")
        differences = definition.differences(header.definition)
        if differences:
            raise DataError(
                f"target cache {store.url!r} is not what the recipe asks for: it differs in "
                f"{', '.join(differences)}"
            )
        return TargetCache(store, header)

    @staticmethod
    def publish(
        store: ObjectStore, header: TargetHeader, covariance: Matrix | None = None
    ) -> "TargetCache":
        """Publish header and covariance, or take what another writer published first.

        The header comes last: a cache whose header is there has all that its calibration fitted.
        The software that fitted it is noted beside it, for people to read.
        """
        if not store.exists(HEADER):
            store.put_if_absent(MADE_WITH, software_bytes())
        if covariance is not None:
            store.put_if_absent(COVARIANCE, covariance_bytes(covariance, header.digest))
        store.put_if_absent(HEADER, header.to_json())
        return TargetCache.open(store, header.definition)

    def covariance(self) -> Matrix:
        """Covariance of the calibration sample's patch tokens, float64 [D, D].

        Raises:
            DataError: when it is damaged, or missing from a cache that was made without it.
        """
        where = f"{self.store.url}/{COVARIANCE}"
        if not self.store.exists(COVARIANCE):
            raise DataError(
                f"target cache {self.store.url!r} has no {COVARIANCE}, which loss.targets=phi-s "
                "needs: run `dpal cache` with this recipe to add it"
            )
        data = self.store.get(COVARIANCE)
        return read_covariance(data, self.header.digest, self.header.width, where)

    def software(self) -> dict[str, str]:
        """What the cache was made with; empty for a cache that does not say."""
        if not self.store.exists(MADE_WITH):
            return {}
        return read_software(self.store.get(MADE_WITH))

    def finished(self) -> set[str]:
        """Names of the image shards whose targets are complete."""
        return finished_shards(self.store)

    def require_complete(self, manifest: Manifest) -> None:
        """Raise DataError unless every shard of `manifest` has its targets."""
        finished = self.finished()
        missing = [ref.name for ref in manifest.shards if ref.name not in finished]
        if missing:
            raise DataError(
                f"target cache {self.store.url!r} lacks {len(missing)} of "
                f"{len(manifest.shards)} shards, first {missing[0]!r}: run `dpal cache` to its end"
            )

    def row(self, ref: ShardRef) -> LedgerRow:
        """The ledger row of a finished shard. Raises DataError when it is of another shard."""
        name = ledger_name(ref)
        with self._reading[hash(name) % ROWS_AT_ONCE]:
            row = self._row(name)
        if (row.source_sha256, row.keys_digest) != (ref.sha256, ref.keys_digest):
            raise DataError(
                f"targets of shard {ref.name!r} in {self.store.url!r} were made from other images; "
                f"delete {self.store.url}/{name}, then run `dpal cache` again"
            )
        return row

    def _read_row(self, name: str) -> LedgerRow:
        return LedgerRow.from_json(self.store.get(name), f"{self.store.url}/{name}")

    def shard(self, series: str, ref: ShardRef, cache: LocalCache | None = None) -> TargetShard:
        """Targets of one series of one shard, mapped.

        Args:
            cache: local copies of remote tars; None keeps a remote one in memory. Local tars
                are mapped in place and not hashed, as their records carry checksums.

        Raises:
            DataError: naming the file, when it is missing, damaged, or of other samples.
        """
        name = series_name(series, ref)
        where = f"{self.store.url}/{name}"
        stored = self.row(ref).series.get(series)
        if stored is None:
            raise DataError(
                f"targets of shard {ref.name!r} in {self.store.url!r} lack {series!r}; delete "
                f"{self.store.url}/{ledger_name(ref)}, then run `dpal cache` again"
            )
        try:
            data = self._data(name, Content(*stored), cache, where)
        except DataError:
            if self.store.exists(name):
                raise
            raise DataError(
                f"targets {where!r} are missing; delete {self.store.url}/{ledger_name(ref)}, then "
                "run `dpal cache` again"
            ) from None
        if len(data) != stored.num_bytes:
            raise DataError(
                f"targets {where!r} have {len(data)} bytes, the ledger says {stored.num_bytes}; "
                "delete the file and its ledger row, then run `dpal cache` again"
            )
        shard = TargetShard(data, self.layout(series), where)
        if keys_digest(shard.keys) != ref.keys_digest:
            raise DataError(
                f"targets {where!r} are not of the samples of shard {ref.name!r}; delete the file "
                "and its ledger row, then run `dpal cache` again"
            )
        return shard

    def layout(self, series: str) -> RecordLayout:
        """Byte layout of the records of `series`."""
        return self.header.layout(kind_of(series))

    def publish_shard(
        self, ref: ShardRef, keys: Sequence[str], tars: Mapping[str, bytes]
    ) -> LedgerRow:
        """Publish every series of a shard, then its ledger row.

        Whoever deletes (`data_tools.unused`) deletes the row, then the tar, then the row again. So
        a tar that was there before and is gone after the row was written, is not coming back: the
        row goes, and all begins again. In every order of the two, no row outlives its tars.

        Raises:
            DataError: when somebody goes on deleting.
        """
        for _ in range(PUBLISHINGS):
            series = {name: self._publish(name, ref, keys, data) for name, data in tars.items()}
            row = LedgerRow(ref.name, ref.sha256, ref.keys_digest, ref.num_samples, series)
            self.store.put_if_absent(ledger_name(ref), row.to_json())
            if all(self.store.exists(series_name(name, ref)) for name in tars):
                return row
            self.store.delete(ledger_name(ref))
        raise DataError(
            f"targets of shard {ref.name!r} in {self.store.url!r} are deleted as soon as they are "
            "written: run `dpal cache` again when nobody deletes there"
        )

    def _publish(self, series: str, ref: ShardRef, keys: Sequence[str], data: bytes) -> SeriesRow:
        """First writer wins; what a killed or rival job left is kept if whole, else replaced."""
        name = series_name(series, ref)
        if not self.store.put_if_absent(name, data):
            try:
                published = self.store.get(name)
            except DataError:  # deleted in between: `publish_shard` will find it missing
                published = data
            if published != data:
                if self._is_whole(series, keys, published):
                    data = published
                else:
                    self.store.put(name, data)
        return SeriesRow(hashlib.sha256(data).hexdigest(), len(data))

    def _is_whole(self, series: str, keys: Sequence[str], data: bytes) -> bool:
        try:
            shard = TargetShard(data, self.layout(series), series)
            shard.require_keys(keys)
            shard.records(range(len(shard)))
        except DataError:
            return False
        return True

    def _data(self, name: str, content: Content, cache: LocalCache | None, where: str) -> Buffer:
        if isinstance(self.store, LocalStore):
            return map_file(self.store.path(name), where)
        damaged = DataError(
            f"targets {where!r} are damaged: their checksum is not the ledger's; delete the "
            "file and its ledger row, then run `dpal cache` again"
        )

        def fetch() -> bytes:
            return fetch_verified(lambda: self.store.get(name), content, damaged)

        return fetch() if cache is None else cache.get(*content, fetch)


def _series_row(sha256: str, num_bytes: int) -> SeriesRow:
    """Raises ValueError unless it is a checksum and a size: a copy is called as the checksum."""
    if not SHA256.match(sha256) or type(num_bytes) is not int or num_bytes <= 0:
        raise ValueError("checksum or size")
    return SeriesRow(sha256, num_bytes)


def open_cache_store(
    recipe: Recipe, definition: TargetDefinition, telemetry: Telemetry | None = None
) -> ObjectStore:
    """The store of the folder that `definition` addresses, published or not."""
    url = f"{recipe.cache.url.rstrip('/')}/targets-{definition.digest}"
    return open_store(url, recipe.storage, telemetry=telemetry)


def open_cache(
    recipe: Recipe, definition: TargetDefinition, telemetry: Telemetry | None = None
) -> TargetCache:
    """The cache that a recipe asks for.

    Raises:
        DataError: when it is not there; names what the caches beside it differ in.
    """
    store = open_cache_store(recipe, definition, telemetry)
    if store.exists(HEADER):
        return TargetCache.open(store, definition)
    beside = open_store(recipe.cache.url, recipe.storage)
    others = [name for name in beside.list("targets-") if name.endswith(f"/{HEADER}")]
    hint = ""
    if others:
        near, differing = min(
            ((name, _differing(beside, name, definition)) for name in others[-NEIGHBOURS:]),
            key=lambda pair: len(pair[1]),
        )
        hint = f"; {near.split('/')[0]} there differs in {', '.join(differing)}"
    raise DataError(f"no targets for this recipe in {recipe.cache.url!r}: run `dpal cache`{hint}")


def _differing(store: ObjectStore, name: str, definition: TargetDefinition) -> list[str]:
    """In which fields the cache with header `name` is of something else."""
    try:
        return definition.differences(TargetHeader.from_json(store.get(name)).definition)
    except DataError:
        return ["its header, which is damaged"]


def finished_part(manifest: Manifest, caches: Sequence[TargetCache]) -> Manifest:
    """The shards of `manifest` whose targets are complete in every cache, in their order.

    Raises:
        DataError: when there is none.
    """
    finished = [cache.finished() for cache in caches]
    shards = tuple(ref for ref in manifest.shards if all(ref.name in names for names in finished))
    if not shards:
        urls = ", ".join(repr(cache.store.url) for cache in caches)
        raise DataError(f"no shard has all of its targets yet in {urls}: run `dpal cache` first")
    return Manifest(shards, manifest.rejected)


def finished_shards(store: ObjectStore) -> set[str]:
    """Names of the image shards that the ledger in `store` lists."""
    names = (name.rpartition("/")[2] for name in store.list("ledger/"))
    return {f"{name.removesuffix('.json')}.tar" for name in names if name.endswith(".json")}


def series_of(views: Views) -> tuple[str, ...]:
    """Names of all series of a cache: `view-0`, ..., `composite-0`, ..."""
    bases = [f"view-{index}" for index in range(views.count)]
    return (*bases, *(f"composite-{index}" for index in range(views.composites)))


def kind_of(series: str) -> Kind:
    """Whether a series holds base views or composites."""
    return "composite" if series.startswith("composite-") else "view"


def series_name(series: str, ref: ShardRef) -> str:
    """Object name of one series of a shard."""
    return f"{series}/{ref.name}"


def ledger_name(ref: ShardRef) -> str:
    """Object name of a shard's ledger row."""
    return row_name(ref.name)


def row_name(shard: str) -> str:
    """The same, by the name of the shard."""
    return f"ledger/{shard.removesuffix('.tar')}.json"
