"""Students of every family by recipe.

Legend: B images, N patch tokens, D width, H x W pixels.
"""

import torch
from torch import Tensor

from dpal.base.errors import ConfigError
from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.model.students.interface import Student
from dpal.model.students.pyramid import PyramidStudent
from dpal.model.students.vit import SHAPES, Shape, VitStudent, set_heads
from dpal.model.tokens import Tokens
from dpal.pixels import normalise

__all__ = [
    "SHAPES",
    "FrozenStudent",
    "PyramidStudent",
    "Shape",
    "Student",
    "VitStudent",
    "build_student",
    "set_heads",
]


class FrozenStudent:
    """A student that is only read: uint8 views in, float32 tokens out (a `FrozenBackbone`).

    Args:
        student: the network; it is switched to evaluation mode.
        view_height: height of the base view its pixels come from; larger views are shrunk.
    """

    def __init__(self, student: Student, view_height: int) -> None:
        self.student = student.eval().requires_grad_(False)
        self.width = student.embed_dim
        self.shrink = view_height // student.input_size[0]
        self.stride = PATCH * self.shrink

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tokens:
        tokens = self.student(normalise(pixels.to(self.student.device), self.shrink))
        return Tokens(tokens.cls.float(), tokens.patches.float())


def build_student(spec: StudentSpec, seed: int | None = None, masked: bool = False) -> Student:
    """A student with fresh weights; with `seed`, the same weights every time.

    Args:
        masked: give it a mask token, so that its forward takes a mask (ViT only).

    Raises:
        ConfigError: timm has no such network, or it cannot serve as a student.
    """
    if masked and spec.family != "vit":
        raise ConfigError(
            f"student.name={spec.name}: masked inputs need a ViT (vit_tiny, vit_small, vit_base)"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return VitStudent(spec, masked) if spec.family == "vit" else PyramidStudent(spec)
