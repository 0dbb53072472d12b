"""The manifest: which shards make up a data set; written last, trusted only when whole."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_tools.storage import ObjectStore, open_store
from data_tools.tar import MAX_MEMBERS, MAX_SHARD_BYTES
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe

MANIFEST = "manifest.json"
FORMAT = 1

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*\.tar\Z")
SHA256 = re.compile(r"^[0-9a-f]{64}\Z")


class ShardRef(NamedTuple):
    """One shard: the unit of storage, of work, of retry and of audit.

    Attributes:
        name: object name beside the manifest, e.g. `persons-000123.tar`.
        sha256: 64 hex digits over the shard's bytes.
        num_bytes: size of the shard.
        num_samples: number of samples in it.
        keys_digest: `keys_digest` of its sample keys, in order.
    """

    name: str
    sha256: str
    num_bytes: int
    num_samples: int
    keys_digest: str


def keys_digest(keys: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 of the keys, one a line, in order."""
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards in order, and how many source files were rejected, by reason."""

    shards: tuple[ShardRef, ...]
    rejected: tuple[tuple[str, int], ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def digest(self) -> str:
        """16 hex digits over the shards: equal digests mean equal bytes."""
        rows = json.dumps([list(shard) for shard in self.shards])
        return hashlib.sha256(rows.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        record = {
            "format": FORMAT,
            "digest": self.digest,
            "num_samples": self.num_samples,
            "rejected": dict(self.rejected),
            "shards": [shard._asdict() for shard in self.shards],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST) -> "Manifest":
        """Read `manifest.json`; `source` names it in errors. Raises DataError if damaged."""
        try:
            record = json.loads(text)
            if record["format"] != FORMAT:
                raise DataError(
                    f"manifest {source!r} has format {record['format']!r}: accepted is {FORMAT}"
                )
            shards = tuple(_shard(row) for row in record["shards"])
            rejected = tuple(sorted((str(k), int(v)) for k, v in record["rejected"].items()))
            manifest = cls(shards, rejected)
            if record["digest"] != manifest.digest:
                raise ValueError("digest")
            if len({shard.name for shard in shards}) != len(shards):
                raise ValueError("duplicate names")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"manifest {source!r} is damaged; build the shards again") from None
        return manifest


def load_manifest(store: ObjectStore) -> Manifest:
    """The published manifest of `store`. Raises DataError when it is absent or damaged."""
    source = f"{store.url}/{MANIFEST}"
    if not store.exists(MANIFEST):
        raise DataError(f"no {MANIFEST} in {store.url!r}: run `dpal shard` to its end first")
    try:
        return Manifest.from_json(_text(store), source)
    except DataError:  # a second answer tells damage on the way from damage in the store
        return Manifest.from_json(_text(store), source)


def _text(store: ObjectStore) -> str:
    return store.get(MANIFEST).decode(errors="replace")


def manifest_of(recipe: Recipe) -> Manifest:
    """What a recipe learns from: its shards, or the first `data.max_shards` of them.

    Raises:
        DataError: when the manifest is absent or damaged.
    """
    manifest = load_manifest(open_store(recipe.data.shards, recipe.storage))
    if not recipe.data.max_shards:
        return manifest
    return Manifest(manifest.shards[: recipe.data.max_shards], manifest.rejected)


def _shard(row: dict[str, Any]) -> ShardRef:
    shard = ShardRef(**row)
    numbers = (shard.num_bytes, shard.num_samples)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("numbers")
    if shard.num_samples > MAX_MEMBERS or shard.num_bytes > MAX_SHARD_BYTES:
        raise ValueError("more than a shard may hold")  # before an order makes room for it
    if not _NAME.match(shard.name) or not SHA256.match(shard.sha256):
        raise ValueError("name or checksum")
    if type(shard.keys_digest) is not str:
        raise ValueError("keys")
    return shard
