"""Queries, keys and values of a frozen teacher, recomputed from the cached output of a block.

A cache holds one tap, "block<k>"; the relations of block k + 1 (TinyMIM, CVPR 2023) need no more
than that block's first norm and its QKV projection.

Legend: B images, N patches, D width, H heads, d = D / H.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.model.networks import Spec, build_network
from dpal.model.timm_import import timm
from dpal.model.timm_teacher import TimmNetwork
from dpal.model.weights import warn_once


class FrozenQkv(nn.Module):
    """norm1 and the QKV projection of one teacher block: q, k, v = split(W norm1(x) + b).

    Prefix tokens besides the CLS token (registers, part tokens) are not cached, so relations among
    the N + 1 tokens leave them out.

    Attributes:
        heads: H.
        width: D.
        block: number of the block, from 0.
        has_cls: False where the cached global vector is the mean of the patches, not a token.
    """

    def __init__(self, block: nn.Module, number: int, *, has_cls: bool) -> None:
        super().__init__()
        attention = cast(Any, block).attn
        self.norm1 = cast(Any, block).norm1
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.heads = int(attention.num_heads)
        self.width = int(attention.qkv.in_features)
        self.block, self.has_cls = number, has_cls
        self.eval().float().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Block input [B, 1 + N, D] to q, k, v, each [B, H, 1 + N, d], not scaled."""
        joined = self.qkv(self.norm1(tokens))  # [B, 1 + N, 3 D]
        q, k, v = joined.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def train(self, mode: bool = True) -> "FrozenQkv":
        """Stay frozen, whatever the module that holds this one does."""
        return super().train(False)


def attention_projection(spec: Spec, taught_weights: Path | None = None) -> FrozenQkv:
    """The frozen QKV of the block behind the tap of a ViT teacher.

    Of a PATH teacher's last block it warns: published files probably never trained it.

    Raises:
        ConfigError: for a teacher without such attention, for the tap "norm", and for the output
            of the last block, behind which there is no attention.
    """
    tap = getattr(spec, "tap", None)
    if spec.kind == "taught" or (tap == "norm" and spec.kind not in ("solider", "mobilesam")):
        raise ConfigError(
            f"teacher.tap='norm' of teacher.kind={spec.kind}: QK and VV relations need a block's "
            "input; accepted are ViT teachers (timm, path, mae, hap, pass, unihcp, sapiens) with "
            "teacher.tap 'block<k>', k below the last block"
        )
    network = build_network(spec, taught_weights) if tap and tap.startswith("block") else None
    model = network.model if isinstance(network, TimmNetwork) else None
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        raise ConfigError(
            f"teacher.kind={spec.kind}: it has no attention over all tokens that could be "
            "recomputed from a tap; accepted are plain ViT teachers (timm without rotary "
            "positions, path, mae, hap, pass, unihcp, sapiens)"
        )
    network = cast(TimmNetwork, network)
    blocks, number = cast(Any, model).blocks, cast(int, network.block) + 1
    if number >= len(blocks):
        raise ConfigError(
            f"teacher.tap={tap!r} is the last block: no attention is behind it; accepted are "
            f"'block0' to 'block{len(blocks) - 2}'"
        )
    if not hasattr(getattr(blocks[number], "attn", None), "qkv"):
        raise ConfigError(
            f"teacher.tap={tap!r}: block {number} of {type(model).__name__} has no QKV projection; "
            "accepted are plain ViT teachers"
        )
    if spec.kind == "path" and number == len(blocks) - 1:
        warn_once(
            f"{spec.weights}: teacher.tap={tap!r} takes the relations of block {number}, the last "
            f"one, which PATH probably never trained (see `dpal inspect`); "
            f"'block{number - 2}' takes those of the one before"
        )
    return FrozenQkv(blocks[number], number, has_cls=network.has_cls)
