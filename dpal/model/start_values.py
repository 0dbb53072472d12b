"""Start values that the reference gives the parts that are discarded after pretraining."""

from torch import nn


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear and convolution layer in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
