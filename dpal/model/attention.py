"""Attention that is fast on the device it runs on; the mathematics is the same everywhere.

PyTorch's fused attention in bfloat16 has a CPU backward that is two to nine times slower than the
same attention in float32 or written out (docs/performance.md). Elsewhere the fused one is best.

Legend: B images, H heads, M queries, N context tokens, c channels of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention [B, H, M, c] of q [B, H, M, c] over k and v [B, H, N, c]."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def suit_attention(network: nn.Module, device: torch.device) -> None:
    """Let the blocks of a timm network attend written out under CPU autocast, fused otherwise."""
    fused = device.type != "cpu" or not torch.is_autocast_enabled("cpu")
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
