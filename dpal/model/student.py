"""The student: a plain timm ViT with the reference's head counts, start values and position rule.

Because it is a timm ViT with other numbers, its state dict is timm's, name by name.

Legend: B images, N patch tokens, D width, h x w token grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.base.teachers import IMAGENET_MEAN, IMAGENET_STD
from dpal.model.timm_import import timm
from dpal.model.tokens import Tokens


class Shape(NamedTuple):
    """Size of a ViT; `paper_heads` are those of the blocks before the last one."""

    width: int
    depth: int
    paper_heads: int
    timm_heads: int


SHAPES = {
    "vit_tiny": Shape(192, 12, 6, 3),
    "vit_small": Shape(384, 12, 6, 6),
    "vit_base": Shape(768, 12, 12, 12),
}


class Student(timm.models.vision_transformer.VisionTransformer):
    """ViT with patch 16, CLS token, and a choice of 1-D or 2-D position resizing.

    Args:
        spec: the `student` section of a recipe.

    Source: reference `models_pretrain.py`; heads (6, ..., 6, 12) for ViT-Ti and ViT-S.
    """

    def __init__(self, spec: StudentSpec) -> None:
        shape = SHAPES[spec.name]
        paper = spec.heads == "paper"
        super().__init__(
            img_size=(spec.height, spec.width),
            patch_size=PATCH,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.paper_heads if paper else shape.timm_heads,
            num_classes=0,
            global_pool="token",
            dynamic_img_size=True,
        )
        if paper:
            set_heads(self.blocks[-1].attn, spec.last_heads)
        self.positions = spec.positions
        self.apply(_initialise)
        nn.init.uniform_(self.pos_embed)
        nn.init.normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Prepend the CLS token and add positions resized to the grid of `x` [B, h, w, D]."""
        batch, height, width, _ = x.shape
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x.flatten(1, 2)], dim=1)
        return x + self.resized_positions(height, width)

    def resized_positions(self, height: int, width: int) -> Tensor:
        """Position embedding [1, 1 + h * w, D] for a token grid, bicubic.

        '1d' resizes the flattened sequence, as the reference does; '2d' resizes the grid.
        """
        if (height, width) == self.patch_embed.grid_size:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size)  # [1, D, h0, w0]
        if self.positions == "1d":
            grid = grid.flatten(2).unsqueeze(3)  # [1, D, N0, 1]
            size = (height * width, 1)
        else:
            size = (height, width)
        resized = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        return torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels: Tensor) -> Tokens:
        """Tokens after the final norm, for normalised float pixels [B, 3, H, W]."""
        tokens = self.forward_features(pixels)  # [B, 1 + N, D]
        return Tokens(tokens[:, 0], tokens[:, 1:])


class FrozenStudent:
    """A student that is only read: uint8 views in, float32 tokens out (a `FrozenBackbone`).

    Args:
        student: the network; it is switched to evaluation mode.
        view_height: height of the base view its pixels come from; larger views are shrunk.
    """

    def __init__(self, student: Student, view_height: int) -> None:
        self.student = student.eval().requires_grad_(False)
        self.width = student.embed_dim
        self.shrink = view_height // (student.patch_embed.img_size[0])
        self.stride = PATCH * self.shrink

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tokens:
        device = self.student.cls_token.device
        tokens = self.student(normalise(pixels.to(device), self.shrink))
        return Tokens(tokens.cls.float(), tokens.patches.float())


def build_student(spec: StudentSpec, seed: int | None = None) -> Student:
    """A student with fresh weights; with `seed`, the same weights every time."""
    if seed is None:
        return Student(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(spec)


def planes_of(pixels: Tensor) -> Tensor:
    """uint8 pixels [B, H, W, 3] as RGB planes in 0..1, float32 [B, 3, H, W]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def normalise(pixels: Tensor, shrink: int = 1) -> Tensor:
    """uint8 pixels [B, H, W, 3] as the student's input (see `normalise_planes`)."""
    return normalise_planes(planes_of(pixels), shrink)


def normalise_planes(planes: Tensor, shrink: int = 1) -> Tensor:
    """RGB planes in 0..1 [B, 3, H, W] to ImageNet-normalised [B, 3, H / shrink, W / shrink].

    Shrinking is the exact mean of `shrink` x `shrink` pixels.
    """
    if shrink > 1:
        planes = F.avg_pool2d(planes, shrink)
    mean = planes.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = planes.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (planes - mean) / std


def set_heads(attention: nn.Module, heads: int) -> None:
    """Split the same projections of a timm attention into another number of heads."""
    width = attention.qkv.in_features
    attention.num_heads = heads
    attention.head_dim = width // heads
    attention.scale = attention.head_dim**-0.5


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        nn.init.zeros_(module.bias)
