"""What SAIP reads from a ViT: the tokens in its middle, its CLS, its last attention's qkv.

Source: reference `models_pretrain.py`, taps 0 (norm of block index 6) and 1 (final norm).
Legend: B images, N patch tokens, T = 1 + N tokens, D width, H heads, d = D / H.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpal.model.student import VitStudent

MIDDLE = 6  # index of the block whose output the pixel and search terms use


class Seen(NamedTuple):
    """What an encoder says about pixels.

    Attributes:
        middle: normed tokens after block index 6 [B, T, D].
        cls: CLS after the final norm [B, D].
        qkv: queries, keys and values of the last block [3, B, H, T, d].
    """

    middle: Tensor
    cls: Tensor
    qkv: Tensor


def see_middle(
    student: VitStudent, norm: nn.Module, pixels: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Normed tokens after block index 6 [B, T, D], of normalised pixels [B, 3, H, W].

    Args:
        keep: int64 [B, n]; only these patches enter the first block, T = 1 + n.
    """
    cls, patches = student.features_at(pixels, MIDDLE, keep)
    return norm(torch.cat([cls.unsqueeze(1), patches], dim=1))


def see(student: VitStudent, norm: nn.Module, pixels: Tensor) -> Seen:
    """Everything that SAIP reads, of normalised pixels [B, 3, H, W]."""
    tokens = student.embed(pixels)
    for block in student.blocks[: MIDDLE + 1]:
        tokens = block(tokens)
    middle = norm(tokens)
    for block in student.blocks[MIDDLE + 1 : -1]:
        tokens = block(tokens)
    last = student.finish(tokens)
    return Seen(middle, last.tokens.cls, torch.stack([last.q, last.k, last.v]))


def see_all(student: VitStudent, norm: nn.Module, views: Sequence[Tensor]) -> list[Seen]:
    """`see` of several batches; those of one image size go through the student at once."""
    results: dict[int, Seen] = {}
    for size in {view.shape[2:] for view in views}:
        same = [index for index, view in enumerate(views) if view.shape[2:] == size]
        counts = [len(views[index]) for index in same]
        seen = see(student, norm, torch.cat([views[index] for index in same]))
        parts = zip(
            seen.middle.split(counts),
            seen.cls.split(counts),
            seen.qkv.split(counts, 1),
            strict=True,
        )
        results |= {index: Seen(*part) for index, part in zip(same, parts, strict=True)}
    return [results[index] for index in range(len(views))]
