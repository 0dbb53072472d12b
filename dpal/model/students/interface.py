"""What every student is: pixels in, one global vector and a stride-16 map of tokens out.

Legend: B images, H x W pixels, N = H / 16 * W / 16 tokens, D width, P places that may drop a path.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.model.students.drop_path import DropPath, share_draws
from dpal.model.tokens import Tokens


class Student(nn.Module):
    """A backbone that is trained.

    Attributes:
        spec: the section of the recipe that it was built from.
        embed_dim: width D of its tokens.
        input_size: height and width of a base view, in pixels.
    """

    spec: StudentSpec
    embed_dim: int
    input_size: tuple[int, int]

    def forward(self, pixels: Tensor) -> Tokens:
        """Tokens (cls [B, D], patches [B, N, D]) of normalised float pixels [B, 3, H, W].

        H and W are multiples of 16, not only those of `input_size`.
        """
        raise NotImplementedError

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image of `height` x `width` pixels."""
        return height // PATCH, width // PATCH

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def timm_module(self) -> nn.Module:
        """The network whose state dict carries timm's names, and a mask token where it has one."""
        return self

    def traceable(self) -> AbstractContextManager[None]:
        """Within: a forward at `input_size` can be traced to a graph (ONNX)."""
        return nullcontext()

    @property
    def num_drop_paths(self) -> int:
        """Number P of places that may drop a path in training."""
        return sum(isinstance(module, DropPath) for module in self.modules())

    @contextmanager
    def dropping(self, draws: Tensor) -> Iterator[None]:
        """Within: paths are dropped by `draws` [B, P], uniform in 0..1, and by no random state.

        Row b belongs to image b of every forward. Without it, torch's generator decides.

        Raises:
            ValueError: for another number of columns than `num_drop_paths`.
        """
        with share_draws(self, draws.to(self.device)):
            yield
