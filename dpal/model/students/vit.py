"""The ViT student: a plain timm ViT with the method's head counts, start values and positions.

Because it is a timm ViT with other numbers, its state dict is timm's, name by name.

Legend: B images, N patch tokens, M of them seen, D width, H heads, c channels of a head,
h x w token grid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.model.attention import attend
from dpal.model.students.drop_path import DropPath
from dpal.model.students.interface import Student
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


class LastAttention(NamedTuple):
    """What a forward gives when the last block's attention is asked for.

    Attributes:
        tokens: the student's tokens after the final norm.
        q, k, v: projections of the last block [B, H, 1 + N, c], CLS first; `q` is not scaled.
    """

    tokens: Tokens
    q: Tensor
    k: Tensor
    v: Tensor


class VitStudent(timm.models.vision_transformer.VisionTransformer, Student):
    """ViT with patch 16, CLS token, and a choice of 1-D or 2-D position resizing.

    Args:
        spec: the `student` section of a recipe.
        masked: give it a mask token, for forwards with a mask.

    Source: reference `models_pretrain.py`; heads (6, ..., 6, 12) for ViT-Ti and ViT-S. Drop-path
    on all blocks but the last, and fixed positions: TinyMIM (teachers_and_baselines: 3.1). Mask
    token and LayerScale: Proteus (2.1).
    """

    def __init__(self, spec: StudentSpec, masked: bool = False) -> None:
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
            init_values=spec.layer_scale or None,
        )
        self.spec = spec
        self.input_size = (spec.height, spec.width)
        self.positions = spec.positions
        if paper:
            set_heads(self.blocks[-1].attn, spec.last_heads)
        if spec.drop_path:
            for block in self.blocks[:-1]:
                block.drop_path1 = DropPath(spec.drop_path)
                block.drop_path2 = DropPath(spec.drop_path)
        if spec.init == "reference":
            self.apply(_initialise)
            nn.init.uniform_(self.pos_embed)
            nn.init.normal_(self.cls_token, std=0.02)
        if spec.position_embedding == "sincos":
            del self.pos_embed
            fixed = sincos_positions(shape.width, *self.patch_embed.grid_size)
            self.register_buffer("pos_embed", fixed)
        self.mask_token = nn.Parameter(torch.zeros(1, shape.width)) if masked else None

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Tokens:
        """Tokens after the final norm, for normalised float pixels [B, 3, H, W].

        Args:
            mask: bool [B, N]; where it is true, the patch embedding is replaced by the mask token
                before positions are added (iBOT, Proteus). Needs a student built with `masked`.
        """
        return _split(self.norm(self.blocks(self.embed(pixels, mask))))

    def features_at(self, pixels: Tensor, block: int, keep: Tensor | None = None) -> Tokens:
        """Tokens as they leave block `block` (0-based), without any norm.

        Args:
            keep: int64 [B, M]; only these patches enter the first block, in this order.
        """
        x = self.embed(pixels)
        if keep is not None:
            rows = 1 + keep.unsqueeze(2).expand(-1, -1, x.shape[2])  # [B, M, D]
            x = torch.cat([x[:, :1], x.gather(1, rows)], dim=1)
        for inner in self.blocks[: block + 1]:
            x = inner(x)
        return _split(x)

    def last_attention(self, pixels: Tensor) -> LastAttention:
        """Tokens, and the queries, keys and values of the last block, in one forward."""
        return self.finish(self.blocks[:-1](self.embed(pixels)))

    def finish(self, x: Tensor) -> LastAttention:
        """Last block and final norm of what enters the last block [B, 1 + N, D]."""
        last = self.blocks[-1]
        qkv = last.attn.qkv(last.norm1(x))
        q, k, v = qkv.unflatten(2, (3, last.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + last.ls1(last.attn.proj(attend(q, k, v).transpose(1, 2).flatten(2)))
        x = x + last.ls2(last.mlp(last.norm2(x)))
        return LastAttention(_split(self.norm(x)), q, k, v)

    def embed(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input of the first block [B, 1 + N, D]; see `forward` for `mask`."""
        x = self.patch_embed(pixels)  # [B, h, w, D]
        if mask is not None:
            assert self.mask_token is not None, "a mask needs a student built with masked=True"
            x = torch.where(mask.view(*x.shape[:3], 1), self.mask_token.to(x.dtype), x)
        return self._pos_embed(x)

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


def set_heads(attention: nn.Module, heads: int) -> None:
    """Split the same projections of a timm attention into another number of heads."""
    width = attention.qkv.in_features
    attention.num_heads = heads
    attention.head_dim = width // heads
    attention.scale = attention.head_dim**-0.5


def sincos_positions(width: int, rows: int, columns: int) -> Tensor:
    """Fixed positions [1, 1 + rows * columns, width]; the CLS token's are zero.

    The first half of the channels encodes the column x, the second the row y, each as
    (sin(p w_i), cos(p w_i)) with w_i = 10000^(-4 i / width), i < width / 4. Source: MAE, which
    TinyMIM follows.
    """
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles = [place.reshape(-1, 1) * omega for place in (x, y)]  # [N, width / 4] each
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(patches, (0, 0, 1, 0)).float().unsqueeze(0)


def _split(tokens: Tensor) -> Tokens:
    return Tokens(tokens[:, 0], tokens[:, 1:])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        nn.init.zeros_(module.bias)
