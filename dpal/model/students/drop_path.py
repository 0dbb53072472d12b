"""Stochastic depth whose draws can be given, so that a restarted run drops the same paths.

Legend: B images, P places that may drop a path.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpal.model.timm_import import timm


class DropPath(nn.Module):
    """Drop a residual branch per image with probability `rate`, in training only.

    What is kept is divided by `1 - rate`, so its mean over draws is the branch itself.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None  # [B]

    def forward(self, branch: Tensor) -> Tensor:
        """The branch [B, ...] with some of its images set to zero."""
        if not self.training:
            return branch
        draws = self.draws
        if draws is None:
            draws = torch.rand(len(branch), device=branch.device)
        kept = (draws >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))


def use_given_draws(network: nn.Module) -> None:
    """Replace timm's DropPath, wherever it drops anything, by the one of this file."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, timm.layers.DropPath):
                rate = float(child.drop_prob or 0)
                setattr(parent, name, DropPath(rate) if rate else nn.Identity())


@contextmanager
def share_draws(network: nn.Module, draws: Tensor) -> Iterator[None]:
    """Give column p of `draws` [B, P] to the p-th DropPath of `network`, for a while.

    Raises:
        ValueError: when P is not the number of places.
    """
    places = [module for module in network.modules() if isinstance(module, DropPath)]
    if draws.ndim != 2 or draws.shape[1] != len(places):
        raise ValueError(f"draws have shape {tuple(draws.shape)}, accepted is [B, {len(places)}]")
    try:
        for place, column in zip(places, draws.unbind(1), strict=True):
            place.draws = column
        yield
    finally:
        for place in places:
            place.draws = None
