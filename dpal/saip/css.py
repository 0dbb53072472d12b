"""CSS, cross-scale search: a person picture writes the kernel that finds it in a pasted scene.

Source: reference `CSSDecoder` in `pretrain_decoder.py` (method: teachers 1.4).
Legend: B images, T tokens of a person picture, s x s patch grid of the scene, D student width,
W decoder width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.saip import SEARCH_HEADS
from dpal.base.students import PATCH
from dpal.model.start_values import xavier
from dpal.saip.blocks import CrossBlock, vit_blocks

_QUERY_BLOCKS = 2
_CONVOLUTIONS = 4


class Scene(NamedTuple):
    """A scene as the search sees it, the same for every query.

    Attributes:
        context: what a query's CLS reads [B, s * s, W].
        features: what a kernel is multiplied with [B, s * s, W].
    """

    context: Tensor
    features: Tensor


class SearchDecoder(nn.Module):
    """Dynamic-kernel search.

    Args:
        student_width: D.
        width: W.
    """

    def __init__(self, student_width: int, width: int) -> None:
        super().__init__()
        self.embed_query = nn.Linear(student_width, width)
        self.blocks = vit_blocks(width, _QUERY_BLOCKS, SEARCH_HEADS)
        self.embed_scene = nn.Linear(student_width, width)
        self.scene_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross = CrossBlock(width, SEARCH_HEADS)
        self.kernel_norm = nn.LayerNorm(width, eps=1e-6)
        self.kernel = nn.Linear(width, width)
        layers: list[nn.Module] = [nn.Conv2d(student_width, width, 1), nn.GELU()]
        for _ in range(_CONVOLUTIONS - 1):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        xavier(self)

    def look(self, patches: Tensor) -> Scene:
        """Read the averaged encoder's middle patch tokens of a square scene [B, s * s, D]."""
        side = round(patches.shape[1] ** 0.5)
        plane = patches.transpose(1, 2).unflatten(2, (side, side))  # [B, D, s, s]
        features = self.convolutions(plane).flatten(2).transpose(1, 2)
        return Scene(self.scene_norm(self.embed_scene(patches)), features)

    def forward(self, query: Tensor, scene: Scene) -> Tensor:
        """Logits <w, F> [B, s * s], for the student's middle tokens of a picture [B, T, D]."""
        x = self.embed_query(query)
        for block in self.blocks:
            x = block(x)
        x = self.cross(x[:, :1], scene.context)  # [B, 1, W]
        kernel = self.kernel(self.kernel_norm(x))
        return (scene.features * kernel).sum(dim=2)


def search_mask(corners: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """1 for every patch whose centre lies in the pasted box, float32 [B, s * s].

    The centre, and not the upper left pixel as in the reference, so that a mask has no shift
    against its person.

    Args:
        corners: (top, left) of the boxes in pixels [B, 2].
        size: height and width of the boxes.
        side: s.
    """
    centres = (torch.arange(side, device=corners.device) + 0.5) * PATCH
    inside = [
        (centres >= corners[:, axis, None]) & (centres < corners[:, axis, None] + size[axis])
        for axis in range(2)
    ]  # two of [B, s]
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).flatten(1).float()


def search_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """L_css of one query [B]: binary cross-entropy with logits [B, s * s], mean over patches."""
    return F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none").mean(dim=1)
