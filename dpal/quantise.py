"""Numbers to codes of 8 or 4 bits with fp16 scales, and back.

    scale = max |x| of a group / limit       code = round(x / scale), -limit to limit

int8: a group is a token, the limit 127. int4: a group is 32 channels of a token (the last one may
be shorter), the limit 7; a code + 8 is a nibble, channel 2i the low one of byte i, 2i + 1 the high
one. A group of zeros has scale 0. Abs-max scales clip nothing but what fp16 rounds away under its
smallest normal number; `Quantised.clipped` counts it.

Legend: B records, N patches, C stored channels, G groups, P packed bytes of a token. Writing is
NumPy; reading is torch, on any device, and imports it only then.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

GROUP = 32  # channels of an int4 group
LIMITS = {"int8": 127, "int4": 7}
OFFSET = 8  # of an int4 code in its nibble


class Quantised(NamedTuple):
    """Codes of a batch of tokens.

    Attributes:
        codes: int8 [B, N, C].
        scales: little-endian float16 [B, N, G]; may hold infinity where a token does not fit.
        clipped: numbers that were outside of the codes' range.
    """

    codes: np.ndarray
    scales: np.ndarray
    clipped: int


def num_groups(storage: str, channels: int) -> int:
    """G of a token of `channels` numbers; 0 for storage without scales."""
    return {"int8": 1, "int4": -(-channels // GROUP)}.get(storage, 0)


def code_bytes(storage: str, channels: int) -> int:
    """P of a token of `channels` numbers."""
    if storage == "int4":
        return -(-channels // 2)
    return channels * {"int8": 1, "fp16": 2, "fp32": 4}[storage]


def quantise(values: np.ndarray, storage: str) -> Quantised:
    """Codes and scales of float32 [B, N, C] under int8 or int4."""
    channels, limit = values.shape[2], LIMITS[storage]
    size = GROUP if storage == "int4" else channels
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, channels, size), axis=2)
    scales = (largest / np.float32(limit)).astype("<f2")  # [B, N, G]
    steps = np.where(scales > 0, scales, 1).astype(np.float32)
    if steps.shape[2] > 1:
        steps = np.repeat(steps, size, axis=2)[:, :, :channels]
    rounded = np.rint(values / steps)
    clipped = int(np.count_nonzero(np.abs(rounded) > limit))
    return Quantised(np.clip(rounded, -limit, limit).astype(np.int8), scales, clipped)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Two int4 codes a byte: int8 [B, N, C] to uint8 [B, N, P]; an odd last nibble is 0."""
    shifted = (codes + np.int8(OFFSET)).view(np.uint8)
    if shifted.shape[2] % 2:
        shifted = np.pad(shifted, ((0, 0), (0, 0), (0, 1)))
    packed: np.ndarray = shifted[:, :, ::2] | (shifted[:, :, 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: "torch.Tensor", channels: int) -> "torch.Tensor":
    """Int4 codes of uint8 [B, N, P]: float32 [B, N, C], where the bytes are."""
    import torch

    codes = torch.stack((packed & 15, packed >> 4), dim=3).flatten(2)
    return codes[:, :, :channels].float().sub_(OFFSET)


def times_scales(codes: "torch.Tensor", scales: "torch.Tensor") -> "torch.Tensor":
    """Float32 codes [B, N, C] times their groups' scales [B, N, G]; may reuse the codes."""
    channels, groups = codes.shape[2], scales.shape[2]
    if groups == 1:
        return codes.mul_(scales)
    if channels % GROUP:
        return codes.mul_(scales.repeat_interleave(GROUP, dim=2)[:, :, :channels])
    return codes.reshape(*scales.shape, GROUP).mul_(scales.unsqueeze(3)).flatten(2)
