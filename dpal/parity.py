"""How far stored targets are from what the teacher says now, in the terms of their codec.

Both sides go through the codec before they are compared, so what a codec costs is no difference:

    stored  = decode(record)              written = decode(encode(teacher's tokens))
    cosine  = cos(stored, written)        of what the codec rounds: turned or standardised tokens
    step    = largest number of a group / limit, as in `dpal.quantise`
    excess  = max |stored - written| / (step + noise * largest number of the token)

One step is what rounding may do to two numbers that are nearly equal; `noise` is how much two
machines, or two batch sizes, may disagree about a forward.

Legend: B records, N patches, D teacher width, C stored channels, G groups of channels.
"""

from typing import NamedTuple

import numpy as np

from dpal.model.tokens import Tokens
from dpal.quantise import GROUP, LIMITS
from dpal.record import Kind
from dpal.targets.coding import decode_batch, encode_batch, stored_patches
from dpal.targets.header import TargetHeader

FLOAT_LIMITS = {"fp16": 2**10, "fp32": 2**23}  # steps up to a token's largest number


class Bounds(NamedTuple):
    """What is accepted as equal.

    Attributes:
        median: of all tokens' cosines, at least.
        smallest: cosine of any token, at least.
        noise: difference of two forwards, as a share of the largest number of a token.
    """

    median: float
    smallest: float
    noise: float

    def accept(self, median: float, smallest: float, excess: float) -> bool:
        """Whether cosines and the largest difference, as a share of what is accepted, will do."""
        return median >= self.median and smallest >= self.smallest and excess <= 1


class Compared(NamedTuple):
    """A batch of records against the teacher.

    Attributes:
        cosines: of every token, the CLS token first [B, 1 + N].
        steps: largest difference of a patch number in steps [B].
        excess: largest difference as a share of what is accepted [B].
        codec_cosines: of the teacher's own patch tokens with the stored ones, both standardised
            [B, N].
    """

    cosines: np.ndarray
    steps: np.ndarray
    excess: np.ndarray
    codec_cosines: np.ndarray


class _Numbers(NamedTuple):
    """Tokens as their codec sees them: standardised CLS [B, D], patches [B, N, C]."""

    cls: np.ndarray
    patches: np.ndarray


def bounds_of(storage: str, precision: str) -> Bounds:
    """What is accepted for a codec's storage, and a teacher that runs in fp32 or bf16.

    int4 rounds so coarsely that noise moves many numbers by a whole step; bf16 keeps 8 bits.
    Measured with a ViT-S on photographs: TF32 products use up half of the bounds of fp32, bf16
    against fp32 half of those of bf16; grey values that are off by 1 fail in fp32, and bilinear
    for bicubic fails in both.
    """
    coarse = 4 if storage == "int4" else 1
    if precision == "bf16":
        return Bounds(1 - 1e-3 * coarse, 1 - 1.6e-2 * coarse, 16 / LIMITS["int8"])
    return Bounds(1 - 5e-4 * coarse, 1 - 2e-3 * coarse, 1 / LIMITS["int8"])


def compare(
    records: np.ndarray, teacher: Tokens, header: TargetHeader, kind: Kind, noise: float
) -> Compared:
    """Compare records uint8 [B, R] with the teacher's tokens of the same views.

    Raises:
        DataError: when the teacher's tokens do not fit into the codec.
    """
    layout = header.layout(kind)
    cls, patches = (part.float().cpu().numpy() for part in teacher)  # [B, D], [B, N, D]
    specs = np.ascontiguousarray(records[:, : layout.cls_start]).view("<u2")  # [B, S]
    again = encode_batch(cls, patches, specs, header, kind)
    stored, written = (_decoded(rows, header, kind) for rows in (records, again))
    with np.errstate(all="ignore"):
        codes, wanted = (_rounded_numbers(tokens, header) for tokens in (stored, written))
        difference = np.abs(codes.patches - wanted.patches)  # [B, N, C]
        largest = np.abs(wanted.patches).max(axis=2, keepdims=True)  # [B, N, 1]
        step = _steps(wanted.patches, layout.storage)  # [B, N, C]
        excess = _ratio(difference, step + noise * largest).max(axis=(1, 2))
        widest = np.abs(wanted.cls).max(axis=1, keepdims=True)  # [B, 1]
        cls_step = widest / FLOAT_LIMITS["fp16"]
        cls_excess = _ratio(np.abs(codes.cls - wanted.cls), cls_step + noise * widest).max(axis=1)
    own = ((tokens - header.patch_mean) / header.patch_std for tokens in (patches, stored[1]))
    return Compared(
        np.concatenate(
            [_cosines(codes.cls, wanted.cls)[:, None], _cosines(codes.patches, wanted.patches)], 1
        ),
        _ratio(difference, step).max(axis=(1, 2)),
        np.maximum(excess, cls_excess),
        _cosines(*own),
    )


def _decoded(records: np.ndarray, header: TargetHeader, kind: Kind) -> tuple[np.ndarray, ...]:
    cls, patches = decode_batch(records, header, kind, "cpu")
    return cls.numpy(), patches.numpy()


def _rounded_numbers(tokens: tuple[np.ndarray, ...], header: TargetHeader) -> _Numbers:
    """What a codec rounds of tokens; fp32, which rounds nothing, standardised."""
    cls, patches = tokens
    if header.layout("view").storage == "fp32":
        patches = (patches - header.patch_mean) / header.patch_std
    else:
        patches = stored_patches(patches, header)
    return _Numbers((cls - header.cls_mean) / header.cls_std, patches)


def _steps(values: np.ndarray, storage: str) -> np.ndarray:
    """Size of a step at every number of [B, N, C]."""
    channels, size = values.shape[2], GROUP if storage == "int4" else values.shape[2]
    largest = np.maximum.reduceat(np.abs(values), np.arange(0, channels, size), axis=2)
    limit = LIMITS.get(storage) or FLOAT_LIMITS[storage]
    return np.repeat(largest / limit, size, axis=2)[:, :, :channels]


def _ratio(difference: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """Difference over what is accepted; 0 where nothing differs, infinite for what is no number."""
    ratio = np.where(difference == 0, 0, difference / accepted)
    return np.where(np.isfinite(ratio), ratio, np.inf)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the last axis; -1 where one of them is no number."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    cosines = np.where((a == b).all(axis=-1), 1.0, cosines)  # two zero tokens are equal
    return np.where(np.isfinite(cosines), cosines, -1.0)
