"""Teacher networks without a global token: one dense map, whose mean is the global vector.

Legend: B images, C channels, h x w map.
"""

import torch
from torch import Tensor, nn


class MapNetwork:
    """A frozen network of one dense map (a `dpal.model.networks.Network`).

    Args:
        model: normalised pixels [B, 3, H, W] to a map [B, C, h, w], unless `read` is overridden.
        width: C.
        multiple: what H and W must be a multiple of.
        dtype: of the forward.
    """

    def __init__(self, model: nn.Module, width: int, multiple: int, dtype: torch.dtype) -> None:
        self.model = model.eval().requires_grad_(False).to(dtype)
        self.width, self.multiple, self.dtype = int(width), int(multiple), dtype

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    def read(self, planes: Tensor) -> Tensor:
        """The map [B, C, h, w] of normalised pixels in the network's precision."""
        dense: Tensor = self.model(planes)
        return dense

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [B, 3, H, W] to a global vector [B, C] and a map [B, C, h, w]."""
        dense = self.read(planes.to(self.dtype)).float()
        return dense.mean((2, 3)), dense
