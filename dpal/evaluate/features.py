"""Frozen features of a set of images: the one thing every downstream task starts from.

Legend: n images, N patches, D embedding width, H x W view pixels.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpal.model.tokens import FrozenBackbone, Tokens


class Features(NamedTuple):
    """What a frozen backbone says about n images.

    Attributes:
        cls: global vectors [n, D], float32.
        patches: patch tokens [n, N, D] in float16 (they are many), or None when not asked for.
        grid: rows and columns of the patch grid, rows x columns = N.
    """

    cls: Tensor
    patches: Tensor | None
    grid: tuple[int, int]


def extract(
    backbone: FrozenBackbone,
    images: Iterable[np.ndarray],
    *,
    patches: bool = False,
    batch_size: int = 32,
) -> Features:
    """Run `backbone` once over `images` (uint8 RGB [H, W, 3], all of one size, at least one).

    Raises:
        ValueError: no image, or images of different sizes.
    """
    cls, dense = [], []
    grid = (0, 0)
    for pixels in _batches(images, batch_size):  # [B, H, W, 3]
        grid = (pixels.shape[1] // backbone.stride, pixels.shape[2] // backbone.stride)
        with torch.no_grad():
            tokens: Tokens = backbone(pixels)
        cls.append(tokens.cls.float().cpu())  # [B, D]
        if patches:
            if tokens.patches.shape[1] != grid[0] * grid[1]:
                raise ValueError(
                    f"backbone gave {tokens.patches.shape[1]} patches, expected grid {grid}"
                )
            dense.append(tokens.patches.to("cpu", torch.float16))  # [B, N, D]
    if not cls:
        raise ValueError("there is no image to extract features of")
    return Features(torch.cat(cls), torch.cat(dense) if patches else None, grid)


def _batches(images: Iterable[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    held: list[np.ndarray] = []
    for image in images:
        held.append(image)
        if len(held) == batch_size:
            yield torch.from_numpy(np.stack(held))
            held = []
    if held:
        yield torch.from_numpy(np.stack(held))
