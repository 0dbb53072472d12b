"""Targets: what the teacher says about a view, how it is written down and read back.

A record (see `dpal.record`) is one view of one sample as bytes. The header of a cache holds what
all records share: which teacher and views they belong to,
per-channel statistics of a calibration sample, the fixed basis of the shape mask, and the turn of
a codec that has one.

Legend: B records, N patches, D teacher width, C stored channels, S spec numbers, R record bytes.
Nothing here imports torch before it is called with tensors, so that torch-free layers can read and
write records.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dpal.base.codec import parse_codec
from dpal.base.errors import DataError
from dpal.quantise import pack_nibbles, quantise, times_scales, unpack_nibbles
from dpal.record import Kind, RecordLayout
from dpal.rotation import Rotation

if TYPE_CHECKING:
    import torch

    from dpal.model.tokens import Tokens

TARGET_VERSION = 1  # raise it whenever the same inputs would give other records


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
        """UTF-8 JSON; floats survive exactly, so equal headers give equal bytes."""
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
        }
        plain["definition"] = asdict(self.definition)
        if self.rotation is None:
            del plain["rotation"]
        else:
            plain["rotation"] = self.rotation.to_plain()
        return json.dumps({"digest": self.digest, **plain}, sort_keys=True, indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "TargetHeader":
        """Read what `to_json` wrote. Raises DataError when it is damaged."""
        try:
            plain = json.loads(data)
            digest = plain.pop("digest")
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
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"target header is damaged: {type(error).__name__} {error}") from None
        if header.digest != digest:
            raise DataError(
                f"target header says digest {digest} but its definition has {header.digest}; "
                "the header was edited or is of another version"
            )
        return header


def encode_batch(
    cls: np.ndarray, patches: np.ndarray, specs: np.ndarray, header: TargetHeader, kind: Kind
) -> np.ndarray:
    """Records of a batch: uint8 [B, R].

    But for fp32, a channel is normalised with the header's statistics: a raw ViT's outlier
    channels would eat the range. Patch tokens of a codec with a rotation are turned instead. Then
    int8 and int4 quantise them as `dpal.quantise` says; the CLS token stays fp16.

    Args:
        cls: float32 [B, D].
        patches: float32 [B, N, D].
        specs: uint16 [B, S], see `spec_numbers`.

    Raises:
        DataError: when a token is not finite or does not fit into the codec.
    """
    layout, size = header.layout(kind), len(cls)
    assert patches.shape == (size, layout.num_patches, layout.width), patches.shape
    records = np.empty((size, layout.num_bytes), dtype=np.uint8)
    records[:, : layout.cls_start] = _bytes(specs, "<u2")
    wide = "<f4" if layout.storage == "fp32" else "<f2"
    with np.errstate(over="ignore", invalid="ignore"):
        if layout.storage != "fp32":
            cls = (cls - header.cls_mean) / header.cls_std  # [B, D]
        patches = stored_patches(patches, header)  # [B, N, C]
        records[:, layout.cls_start : layout.scale_start] = _finite(cls, wide, kind)
        if layout.num_groups:
            codes, scales, _clipped = quantise(patches, layout.storage)
            records[:, layout.scale_start : layout.code_start] = _finite(scales, "<f2", kind)
            packed = pack_nibbles(codes) if layout.storage == "int4" else codes.view(np.uint8)
            records[:, layout.code_start : layout.crc_start] = _bytes(packed, "u1")
        else:
            records[:, layout.code_start : layout.crc_start] = _finite(patches, wide, kind)
    crcs = np.array([zlib.crc32(row.data[: layout.crc_start]) for row in records], dtype=np.uint32)
    records[:, layout.crc_start :] = _bytes(crcs[:, None], "<u4")
    return records


def stored_patches(patches: np.ndarray, header: TargetHeader) -> np.ndarray:
    """What a codec rounds: patch tokens [B, N, D] turned, normalised or raw, float32 [B, N, C]."""
    codec = parse_codec(header.definition.codec)
    if codec.turn != "none":
        assert header.rotation is not None, "a header with such a codec is fitted with a rotation"
        return header.rotation.apply(patches, header.patch_mean)
    if codec.storage == "fp32":
        return patches
    normalised: np.ndarray = (patches - header.patch_mean) / header.patch_std
    return normalised


def decode_batch(
    records: "np.ndarray | torch.Tensor",
    header: TargetHeader,
    kind: Kind,
    device: "torch.device | str | None" = None,
) -> "Tokens":
    """Tokens of a batch of records, float32, dequantised on `device` (default: where they are).

    Args:
        records: uint8 [B, R] of one kind.
    """
    import torch

    from dpal.model.tokens import Tokens

    layout = header.layout(kind)
    raw = torch.as_tensor(records).to(device) if device is not None else torch.as_tensor(records)
    if raw.dtype != torch.uint8 or raw.ndim != 2 or raw.shape[1] != layout.num_bytes:
        raise DataError(
            f"{kind} records are {raw.dtype} {tuple(raw.shape)}: "
            f"accepted is uint8 [batch, {layout.num_bytes}]"
        )

    def part(start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return raw[:, start:stop].contiguous().view(dtype).float()

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, device=raw.device)

    wide = torch.float32 if layout.storage == "fp32" else torch.float16
    cls = part(layout.cls_start, layout.scale_start, wide)  # [B, D]
    if layout.storage == "int4":
        packed = raw[:, layout.code_start : layout.crc_start]
        packed = packed.reshape(len(raw), layout.num_patches, -(-layout.channels // 2))
        patches = unpack_nibbles(packed, layout.channels)  # [B, N, C]
    else:
        codes = part(layout.code_start, layout.crc_start, torch.int8 if layout.num_groups else wide)
        patches = codes.view(-1, layout.num_patches, layout.channels)  # [B, N, C]
    if layout.num_groups:
        scales = part(layout.scale_start, layout.code_start, torch.float16)
        scales = scales.view(-1, layout.num_patches, layout.num_groups)  # [B, N, G]
        patches = times_scales(patches, scales)
    if layout.storage != "fp32":
        cls.mul_(on_device(header.cls_std)).add_(on_device(header.cls_mean))
    mean = on_device(header.patch_mean)
    if header.rotation is not None:
        with torch.autocast(raw.device.type, enabled=False):  # else bf16, within a student's step
            basis = on_device(header.rotation.basis) * header.rotation.scale  # [C, D]
            turned = torch.addmm(mean, patches.flatten(0, 1), basis)
        patches = turned.view(len(raw), layout.num_patches, layout.width)  # [B, N, D]
    elif layout.storage != "fp32":
        patches.mul_(on_device(header.patch_std)).add_(mean)
    return Tokens(cls, patches)


def _finite(values: np.ndarray, dtype: str, kind: Kind) -> np.ndarray:
    stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise DataError(
            f"a teacher token of a {kind} is not finite or too large for {np.dtype(dtype).name}; "
            "set cache.codec=fp32, or check the teacher's weights and precision"
        )
    return _bytes(stored, dtype)


def _bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Little-endian bytes of every row: uint8 [B, bytes]."""
    plain = np.ascontiguousarray(values.astype(dtype, copy=False))
    return plain.reshape(len(plain), -1).view(np.uint8)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
