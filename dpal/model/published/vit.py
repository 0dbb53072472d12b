"""Published ViT teachers: PATH, MAE, HAP, PASS, UniHCP and Sapiens files, loaded strictly.

The files differ in names, prefixes, wrappers, prefix tokens and the form of their positions; the
network is the same plain ViT. Sizes are read from the tensors.

Legend: B images, D width, P prefix tokens (CLS, then part tokens), N = gh x gw patches.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.model.timm_import import timm
from dpal.model.weights import bare, count_of, load_strictly, tensor_of

DECODER = ("decoder", "mask_token")  # what a masked autoencoder is trained with
TASKS = ("neck_module.", "decoder_module.", "neck.", "head.", "loss_module.")
SELF = ("head.",)  # projection head of self-distillation
DROPPED = {
    "path": (*TASKS, *DECODER),
    "unihcp": (*TASKS, *DECODER),
    "mae": (*DECODER, "head."),
    "hap": (*DECODER, "head."),
    "pass": SELF,
    "sapiens": (*DECODER, "neck.", "head.", "decode_head."),
}
PARTS = 3  # PASS
HEADS_OF_WIDTH = {1280: 16, 1920: 32}  # ViT-H and the largest Sapiens; all others: 64 per head
_MMPRETRAIN = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm\.", "ln1."),
    (r"^blocks\.", "layers."),
    (r"\.norm(\d)\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


class Positions(NamedTuple):
    """Prefix tokens and positions of a file, in one form.

    Attributes:
        tokens: CLS and part tokens [1, P, D]; P = 0 without a CLS token.
        prefix: their positions [1, P, D].
        patches: positions of the patches [1, N, D], row-major on `grid`.
        grid: gh and gw.
        warning: what is not trained about the CLS token; empty when it is.
    """

    tokens: Tensor
    prefix: Tensor
    patches: Tensor
    grid: tuple[int, int]
    warning: str


class LoadedVit(NamedTuple):
    """A ViT with the weights of a file, and what was left out of the file."""

    model: nn.Module
    dropped: dict[str, int]
    positions: Positions


class PublishedVit(timm.models.vision_transformer.VisionTransformer):  # type: ignore[misc,name-defined]
    """A ViT whose positions are resized as these teachers were run: 2-D, bicubic, no antialias."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        count = self.num_prefix_tokens
        prefix, patches = self.pos_embed[:, :count], self.pos_embed[:, count:]
        if (height, width) != tuple(self.patch_embed.grid_size):
            grid = patches.unflatten(1, self.patch_embed.grid_size).permute(0, 3, 1, 2)
            # align_corners False; bicubic has no half-precision kernel on every device
            grid = F.interpolate(grid.float(), (height, width), mode="bicubic")
            patches = grid.flatten(2).mT.to(patches.dtype)  # [1, N, D]
        x = x.reshape(batch, height * width, dim) + patches
        tokens = [self.cls_token, self.reg_token]
        first = [token for token in tokens if token is not None]
        if first:
            front = torch.cat(first, 1) + prefix  # [1, P, D]
            x = torch.cat([front.expand(batch, -1, -1), x], 1)
        return self.pos_drop(x)


def load_vit(kind: str, state: dict[str, Any], source: Path, *, padding: int = 0) -> LoadedVit:
    """The ViT of a published file.

    Args:
        kind: "path", "mae", "hap", "pass", "unihcp" or "sapiens".
        state: the file's state dict, unwrapped.
        padding: pixels of zero padding of the patch convolution (Sapiens, fine-tuned files: 2).

    Raises:
        ConfigError: naming every tensor that is missing, unexpected, or of another shape.
    """
    stripped = bare(state, source, droppable=DROPPED[kind])
    rest = dict(stripped.state)
    positions = _positions(kind, rest, source)
    named = mmpretrain_name if kind == "sapiens" else str
    model = _empty(rest, positions, source, named)
    count = positions.tokens.shape[1]
    if count:
        rest["cls_token"] = positions.tokens[:, :1]
    if count > 1:
        rest["reg_token"] = positions.tokens[:, 1:]
    rest["pos_embed"] = torch.cat([positions.prefix, positions.patches], 1)
    load_strictly(model, rest, source, name_in_file=named)
    model.patch_embed.proj.padding = (padding, padding)
    return LoadedVit(model, stripped.dropped, positions)


def mmpretrain_name(key: str) -> str:
    """The mmpretrain name of a timm ViT tensor (Sapiens files)."""
    for pattern, replacement in _MMPRETRAIN:
        key = re.sub(pattern, replacement, key)
    return key


def grid_of(count: int) -> tuple[int, int] | None:
    """Grid of `count` positions: square, or twice as high as wide; None when it is neither."""
    side = math.isqrt(count)
    if count and side * side == count:
        return side, side
    side = math.isqrt(count // 2)
    return (2 * side, side) if side and 2 * side * side == count else None


def heads_of(width: int, source: Path) -> int:
    """Attention heads, which no tensor tells. Raises ConfigError for a width without a rule."""
    heads = HEADS_OF_WIDTH.get(width, width // 64)
    if not heads or width % heads:
        raise ConfigError(
            f"{source}: width {width}: accepted are multiples of 64, which have 64 per head"
        )
    return heads


def _empty(
    state: dict[str, Any], positions: Positions, source: Path, named: Callable[[str], str]
) -> nn.Module:
    """A ViT of the file's sizes."""
    patch_weight = tensor_of(state, named("patch_embed.proj.weight"), source, 4)
    width, patch = patch_weight.shape[0], patch_weight.shape[2]
    if positions.patches.shape[2] != width:
        raise ConfigError(
            f"{source}: pos_embed is {list(positions.patches.shape)} and "
            f"{named('patch_embed.proj.weight')} is {list(patch_weight.shape)}: widths differ"
        )
    hidden = state.get(named("blocks.0.mlp.fc1.weight"))
    ratio = hidden.shape[0] / width if isinstance(hidden, Tensor) and hidden.ndim == 2 else 4.0
    count = positions.tokens.shape[1]
    return PublishedVit(
        img_size=tuple(side * patch for side in positions.grid),
        patch_size=patch,
        embed_dim=width,
        depth=count_of(state, r"(?:blocks|layers)\.(\d+)\."),
        num_heads=heads_of(width, source),
        mlp_ratio=ratio,
        class_token=count > 0,
        reg_tokens=max(count - 1, 0),
        global_pool="token" if count else "avg",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        fc_norm=False,
        final_norm=True,
        num_classes=0,
        weight_init="skip",  # every tensor is loaded
        dynamic_img_size=True,
    )


def _positions(kind: str, state: dict[str, Any], source: Path) -> Positions:
    """Take prefix tokens and positions, in whichever of the known forms, out of `state`."""
    table = tensor_of(state, "pos_embed", source, 3)
    del state["pos_embed"]
    width = table.shape[2]
    nothing = table.new_zeros(1, 0, width)
    if kind == "unihcp":
        return Positions(nothing, nothing, table, _grid(table, source), "")
    if kind == "pass":
        names = [f"part_token{i + 1}" for i in range(PARTS)]
        places = ["cls_pos", *(f"part{i + 1}_pos" for i in range(PARTS))]
        tokens = torch.cat([_take(state, key, source, width) for key in ("cls_token", *names)], 1)
        prefix = torch.cat([_take(state, key, source, width) for key in places], 1)
        return Positions(tokens, prefix, table, _grid(table, source), "")
    if kind == "path":
        return _path_positions(state, table, source)
    cls = _take(state, "cls_token", source, width)
    patches = table[:, 1:]
    return Positions(cls, table[:, :1], patches, _grid(patches, source), "")


def _path_positions(state: dict[str, Any], table: Tensor, source: Path) -> Positions:
    """The four forms of PATH files: CLS position in front, beside, or not there; CLS or none."""
    width = table.shape[2]
    nothing = table.new_zeros(1, 0, width)
    place = None
    if "cls_token_pos_embed" in state:
        place = _take(state, "cls_token_pos_embed", source, width)
    elif grid_of(table.shape[1]) is None:
        place, table = table[:, :1], table[:, 1:]
    grid = _grid(table, source)
    if "cls_token" not in state:
        if place is not None:
            raise ConfigError(f"{source}: missing cls_token, though the file has its position")
        warning = "has no CLS token; the mean of the patches stands in for it"
        return Positions(nothing, nothing, table, grid, warning)
    cls = _take(state, "cls_token", source, width)
    if place is None:
        warning = "has no position of the CLS token: its CLS was not trained; 0 stands in for it"
        return Positions(cls, torch.zeros_like(cls), table, grid, warning)
    return Positions(cls, place, table, grid, "")


def _take(state: dict[str, Any], key: str, source: Path, width: int) -> Tensor:
    value = tensor_of(state, key, source, 3)
    if tuple(value.shape) != (1, 1, width):
        raise ConfigError(f"{source}: {key} is {list(value.shape)}, not {[1, 1, width]}")
    del state[key]
    return value


def _grid(patches: Tensor, source: Path) -> tuple[int, int]:
    grid = grid_of(patches.shape[1])
    if grid is None:
        raise ConfigError(
            f"{source}: pos_embed has {patches.shape[1]} patches; accepted are square grids and "
            "grids twice as high as wide, behind as many prefix tokens as this kind has"
        )
    return grid
