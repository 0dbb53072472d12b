"""CSR, cross-scale reconstruction: pixels of an enlarged view, from a quarter of it and one CLS.

Source: reference `models_pretrain.py` and `pretrain_decoder.py` (method: teachers 1.4).
Legend: B images, N patches of the enlarged view, n of them visible, D student width, W decoder
width, P = 768 numbers of a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.students import PATCH
from dpal.chance import generator
from dpal.model.start_values import xavier
from dpal.saip.blocks import vit_blocks

_EPS = 1e-6


class Masks(NamedTuple):
    """Which patches of the enlarged view are shown, and which are scored.

    Attributes:
        visible: indices of the shown patches, int64 [B, n], ascending.
        scored: 1 where a hidden patch counts, float32 [B, N].
    """

    visible: np.ndarray
    scored: np.ndarray


def draw_masks(
    seed: int,
    keys: Sequence[str],
    step: int,
    anchor: tuple[int, int],
    grid: tuple[int, int],
    ratio: float,
) -> Masks:
    """Masks of a batch: drawn on the anchor grid, resized (nearest) to the enlarged grid.

    Every image shows n = int(N (1 - ratio)) patches (`visible` [B, n]), so that a batch has one
    shape: where the resized mask leaves more, some stay hidden without being scored; where it
    leaves fewer, some masked ones are shown and (unlike in the reference) not scored.

    Args:
        anchor: patch rows and columns of a base view.
        grid: those of the enlarged view.
        ratio: share of hidden patches.
    """
    count, cells = anchor[0] * anchor[1], grid[0] * grid[1]
    shown = int(cells * (1 - ratio))
    nearest = _nearest_cells(anchor, grid)
    visible = np.empty((len(keys), shown), dtype=np.int64)
    scored = np.empty((len(keys), cells), dtype=np.float32)
    for row, key in enumerate(keys):
        rng = generator(seed, "saip-mask", key, step)
        masked = np.ones(count, dtype=bool)
        masked[rng.permutation(count)[: int(count * (1 - ratio))]] = False
        resized = masked[nearest]  # [N]
        order = np.lexsort((rng.random(cells), resized))  # unmasked ones first, each in any order
        visible[row] = np.sort(order[:shown])
        scored[row] = resized
        scored[row, visible[row]] = 0
    return Masks(visible, scored)


class ReconstructionDecoder(nn.Module):
    """A light ViT over [CLS of the masked view, CLS of the first view, shown and hidden patches].

    Args:
        student_width: D.
        anchor: patch rows and columns of a base view.
        width, depth, heads: of the decoder.
    """

    def __init__(
        self, student_width: int, anchor: tuple[int, int], *, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(student_width, width)
        self.mask_token = nn.Parameter(torch.rand(1, 1, width))
        self.positions = nn.Parameter(torch.rand(1, 1 + anchor[0] * anchor[1], width))
        self.blocks = vit_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.predict = nn.Linear(width, 3 * PATCH * PATCH)
        xavier(self)

    def forward(self, tokens: Tensor, first_cls: Tensor, visible: Tensor, cells: int) -> Tensor:
        """Predicted normalised patches [B, N, P].

        Args:
            tokens: middle tokens of the masked view, CLS first [B, 1 + n, D].
            first_cls: middle CLS of the unmasked first view [B, D].
            visible: indices of the shown patches [B, n].
            cells: N.
        """
        tokens, first = self.embed(tokens), self.embed(first_cls.unsqueeze(1))
        places = visible.unsqueeze(2).expand(-1, -1, tokens.shape[2])
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), cells, -1)
        patches = hidden.scatter(1, places, tokens[:, 1:])  # [B, N, W]
        x = torch.cat([tokens[:, :1], first, patches], dim=1)  # [B, 2 + N, W]
        x = x + self._resized_positions(cells + 1)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))[:, 2:]

    def _resized_positions(self, length: int) -> Tensor:
        """Positions [1, 1 + length, W]: the first as it is, the rest as a bicubic sequence."""
        rest = self.positions[:, 1:].transpose(1, 2).unsqueeze(3)  # [1, W, N0, 1]
        rest = F.interpolate(rest, size=(length, 1), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], rest.squeeze(3).transpose(1, 2)], dim=1)


def normalised_patches(pixels: Tensor) -> Tensor:
    """Target [B, N, P] of pixels [B, 3, H, W]: (x - mean) / sqrt(var + 1e-6) of every patch.

    Numbers of a patch in the order row, column, channel; unbiased variance, as in the reference.
    """
    batch, planes, height, width = pixels.shape
    split = pixels.reshape(batch, planes, height // PATCH, PATCH, width // PATCH, PATCH)
    patches = split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2).float()  # [B, N, P]
    centred = patches - patches.mean(dim=2, keepdim=True)
    return centred / (patches.var(dim=2, keepdim=True) + _EPS).sqrt()


def reconstruction_loss(predicted: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """L_csr [B] = (1 / |M|) sum over scored patches of mean (x^ - x)^2.

    For patches [B, N, P] and a mask [B, N] of zeros and ones.
    """
    errors = (predicted.float() - target).square().mean(dim=2)  # [B, N]
    return (errors * scored).sum(dim=1) / scored.sum(dim=1)


def _nearest_cells(anchor: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Index [N] of the anchor cell that each cell of the larger grid takes its value from."""
    rows = np.arange(grid[0]) * anchor[0] // grid[0]
    columns = np.arange(grid[1]) * anchor[1] // grid[1]
    return (rows[:, None] * anchor[1] + columns).ravel()
