"""What a cache of targets is of, and what all its records share.

The header of a cache says which teacher and views its records belong to, per-channel statistics of
a calibration sample, the fixed basis of the shape mask, and the turn of a codec that has one.

Legend: D teacher width.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from dpal.base.codec import parse_codec
from dpal.base.errors import DataError
from dpal.record import Kind, RecordLayout
from dpal.rotation import Rotation

TARGET_VERSION = 1  # raise it whenever the same inputs would give other records
MEND = "delete its folder, then run `dpal cache` again"
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class TargetDefinition:
    """Everything that decides the content of a cache; its digest is the cache's address.

    Attributes:
        teacher: identity of the teacher (weights, tap, preprocessing, precision, versions).
        views: `ViewPlan.describe()`.
        grid: rows and columns of the patch grid of a base view.
        composite_grid: the same of a composite.
        codec: how tokens are stored, a word of `dpal.base.codec`.
        manifest: digest of the image shards.
        backgrounds: digest of the background pool.
        calibration_images: images that the statistics are fitted on.
        version: of the target definition itself.
    """

    teacher: Mapping[str, Any]
    views: Mapping[str, Any]
    grid: tuple[int, int]
    composite_grid: tuple[int, int]
    codec: str
    manifest: str
    backgrounds: str
    calibration_images: int
    version: int = TARGET_VERSION

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: "TargetDefinition") -> list[str]:
        """Dotted names of the fields in which two definitions differ, with both values."""
        mine, theirs = (dict(_flat(json.loads(json.dumps(asdict(d))))) for d in (self, other))
        return [
            f"{name} ({mine.get(name)!r} against {theirs.get(name)!r})"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True, eq=False)
class TargetHeader:
    """What all records of one cache share.

    Attributes:
        definition: what the cache is of.
        width: D, channels of a teacher token.
        patch_mean, patch_std: per-channel statistics of the patch tokens, float32 [D].
        cls_mean, cls_std: per-channel statistics of the CLS tokens, float32 [D].
        direction: first principal component of the patch tokens, unit length, float32 [D].
        low, high: projections on `direction` that the shape mask maps to 0 and 1.
        calibration_keys: SHA-256 over the keys of the calibration sample.
        rotation: what patch tokens are turned by before they are stored; None for a codec that
            normalises every channel by itself, or stores raw tokens.
    """

    definition: TargetDefinition
    width: int
    patch_mean: np.ndarray
    patch_std: np.ndarray
    cls_mean: np.ndarray
    cls_std: np.ndarray
    direction: np.ndarray
    low: float
    high: float
    calibration_keys: str
    rotation: Rotation | None = None

    @property
    def digest(self) -> str:
        """Address of the cache that this header belongs to."""
        return self.definition.digest

    def layout(self, kind: Kind) -> "RecordLayout":
        """Byte layout of the records of base views or of composites."""
        view = kind == "view"
        rows, columns = self.definition.grid if view else self.definition.composite_grid
        return RecordLayout(kind, self.definition.codec, self.width, rows * columns)

    def to_json(self) -> bytes:
        """UTF-8 JSON with a checksum; floats survive exactly: equal headers give equal bytes."""
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
        }
        plain["definition"] = asdict(self.definition)
        if self.rotation is None:
            del plain["rotation"]
        else:
            plain["rotation"] = self.rotation.to_plain()
        plain["digest"] = self.digest
        plain["sha256"] = _checksum(plain)
        return json.dumps(plain, sort_keys=True, indent=1).encode()

    @staticmethod
    def from_json(data: bytes, where: str = "target header") -> "TargetHeader":
        """Read what `to_json` wrote; headers of before have no checksum.

        Args:
            where: what the data are, for the message.

        Raises:
            DataError: when it is damaged.
        """
        try:
            plain = json.loads(data)
            stored = plain.pop("sha256", None)
            checksum, digest = _checksum(plain), plain.pop("digest")
            if type(plain["width"]) is not int:
                raise ValueError("width")
            inner = plain["definition"]
            grids = {name: tuple(inner[name]) for name in ("grid", "composite_grid")}
            plain["definition"] = TargetDefinition(**{**inner, **grids})
            for name in ("patch_mean", "patch_std", "cls_mean", "cls_std", "direction"):
                plain[name] = np.asarray(plain[name], dtype=np.float32)
                if plain[name].shape != (plain["width"],) or not np.isfinite(plain[name]).all():
                    raise ValueError(name)
            for name in ("patch_std", "cls_std"):
                if not (plain[name] > 0).all():
                    raise ValueError(name)
            for name in ("low", "high"):
                plain[name] = float(plain[name])
                if not math.isfinite(plain[name]):
                    raise ValueError(name)
            codec = parse_codec(plain["definition"].codec)
            if "rotation" in plain or codec.turn != "none":
                plain["rotation"] = Rotation.from_plain(plain["rotation"], codec, plain["width"])
            header = TargetHeader(**plain)
        except _DAMAGE as error:
            raise DataError(
                f"{where} is damaged ({type(error).__name__} {error}); {MEND}"
            ) from None
        if header.digest != digest:
            raise DataError(
                f"{where} says digest {digest} but its definition has {header.digest}: it was "
                f"edited, or is of another version; {MEND}"
            )
        if stored not in (None, checksum):
            raise DataError(f"{where} is damaged (its checksum does not match); {MEND}")
        return header


def _checksum(plain: Mapping[str, Any]) -> str:
    """SHA-256 over the JSON of a header without it, sorted by key."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
