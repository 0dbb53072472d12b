"""What a backbone says about pixels: one global vector and a map of patch tokens.

Shapes: B images, H x W pixels, N = grid height x grid width patches, D embedding width.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class Tokens(NamedTuple):
    """Features of a batch.

    Attributes:
        cls: global vector [B, D], float32.
        patches: patch tokens in row-major order [B, N, D], float32.
    """

    cls: Tensor
    patches: Tensor


class FrozenBackbone(Protocol):
    """A network that is only read: a teacher, a trained student, or an untrained one.

    `pixels` is uint8 RGB [B, H, W, 3]; the network resizes and normalises by itself. The patch
    tokens come on the grid `(H // stride, W // stride)`, whatever the network's own grid is.
    """

    width: int
    stride: int

    def __call__(self, pixels: Tensor) -> Tokens: ...
