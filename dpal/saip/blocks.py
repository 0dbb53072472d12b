"""Parts that the decoders of SAIP are made of.

Legend: B images, M queries, N context tokens, W decoder width.
"""

from torch import Tensor, nn

from dpal.model.decoder import Attention
from dpal.model.timm_import import timm


def vit_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """Pre-norm ViT blocks with an MLP four times as wide."""
    block = timm.models.vision_transformer.Block
    return nn.ModuleList(block(width, heads, qkv_bias=True) for _ in range(depth))


class CrossBlock(nn.Module):
    """Queries attend a context, then an MLP; pre-norm, with residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Queries [B, M, W] after reading a context [B, N, W]."""
        queries = queries + self.attention(self.norm1(queries), context)
        return queries + self.mlp(self.norm2(queries))
