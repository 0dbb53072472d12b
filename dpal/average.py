"""An exponential moving average of a network's parameters."""

import copy

import torch
from torch import nn


class MovingAverage(nn.Module):
    """A frozen copy that follows a network: a <- m a + (1 - m) p, buffers copied.

    Args:
        network: what is followed; the average starts as its copy.
        momentum: m, unless `update` is given another one.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.momentum = momentum

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stay in evaluation mode, whatever the module that holds this one does."""
        return super().train(False)

    @torch.no_grad()
    def update(self, network: nn.Module, momentum: float | None = None) -> None:
        """Follow `network` by one step."""
        weight = 1 - (self.momentum if momentum is None else momentum)
        for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
            mine.lerp_(theirs.detach().to(mine.dtype), weight)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
