"""How targets are written down and read back.

A record (see `dpal.record`) is one view of one sample as bytes.

Legend: B records, N patches, D teacher width, C stored channels, S spec numbers, R record bytes.
Nothing here imports torch before it is called with tensors, so that torch-free layers can read and
write records.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from dpal.base.codec import parse_codec
from dpal.base.errors import DataError
from dpal.quantise import pack_nibbles, quantise, times_scales, unpack_nibbles
from dpal.record import Kind
from dpal.targets.header import TargetHeader

if TYPE_CHECKING:
    import torch

    from dpal.model.tokens import Tokens


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
