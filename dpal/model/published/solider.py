"""SOLIDER teachers: a Swin steered by a semantic weight, in the file's own names and its own way.

Three things differ from timm's Swin and decide tokens: maps are padded to whole windows before
they are shifted (not after), every odd block shifts even when one window covers the map, and the
2x2 merging orders its inputs by channel first. Sizes and heads are read from the tensors.

Legend: B images, C channels, h x w map, W windows, n = window * window tokens of one window.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.model.map_network import MapNetwork
from dpal.model.weights import bare, count_of, load_strictly, tensor_of

DROPPED = ("head.", "fc.", "classifier.")
STAGES = 4
PATCH = 4


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias per relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        steps = torch.arange(window)
        offset = steps[:, None] - steps[None, :] + window - 1  # [window, window]
        index = offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]
        self.register_buffer("relative_position_index", index.reshape(window**2, window**2))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [B * W, n, C] of windows; `mask` [W, n, n] is added to the logits."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.unflatten(0, (x.shape[1], x.shape[1])).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:  # bias [1, heads, n, n]
            repeats = x.shape[0] // mask.shape[0]
            bias = bias + mask[:, None].repeat(repeats, 1, 1, 1)  # [B * W, heads, n, n]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(seen.transpose(1, 2).flatten(2))


class ShiftedWindows(nn.Module):
    """Attention over a map [B, h, w, C], padded to whole windows, then shifted."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.w_msa = WindowAttention(width, heads, window)

    def forward(self, x: Tensor) -> Tensor:
        height, width, size = x.shape[1], x.shape[2], self.window
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        padded, mask = (x.shape[1], x.shape[2]), None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            mask = self._mask(padded, x)
        windows = self.w_msa(_windows(x, size), mask).unflatten(1, (size, size))
        counts = (x.shape[0], padded[0] // size, padded[1] // size)
        x = windows.unflatten(0, counts).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def _mask(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """Logits [W, n, n] that keep apart what only the shift brought together."""
        rows, columns = (self._regions(side, like.device) for side in size)
        regions = (3 * rows[:, None] + columns[None, :])[None, :, :, None]
        apart = _windows(regions, self.window)[:, :, 0]  # [W, n]
        return (apart[:, None] != apart[:, :, None]).to(like.dtype) * -100

    def _regions(self, side: int, device: torch.device) -> Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - self.window).int() + (place >= side - self.shift).int()


class Block(nn.Module):
    """One Swin block, with the names of the file."""

    def __init__(self, width: int, heads: int, window: int, hidden: int, *, shift: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = ShiftedWindows(width, heads, window, window // 2 if shift else 0)
        self.norm2 = nn.LayerNorm(width)
        first = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.ffn = nn.ModuleDict({"layers": nn.Sequential(first, nn.Linear(hidden, width))})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn["layers"](self.norm2(x))


class Merge(nn.Module):
    """2x2 patches to one; channels are ordered as `unfold` gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))  # [B, h, w, C]
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, h/2, 2, w/2, 2, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 5, 2, 4).flatten(3)))


class Stage(nn.Module):
    """Blocks on one map, and the merging behind them (none behind the last)."""

    def __init__(
        self, width: int, heads: int, window: int, hidden: int, depth: int, *, last: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(Block(width, heads, window, hidden, shift=bool(i % 2)) for i in range(depth))
        )
        if not last:
            self.downsample = Merge(width)


class SoliderSwin(nn.Module):
    """The network of SOLIDER (CVPR 2023), read behind one stage.

    After stages 0 to 2 the merged map is x * softplus(w(l)) + b(l) with l = [s, 1 - s] and s the
    semantic weight; the file's fourth pair of w and b never meets an output.
    """

    def __init__(
        self, width: int, depths: Sequence[int], heads: Sequence[int], window: int, ratio: int
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"projection": nn.Conv2d(3, width, PATCH, PATCH), "norm": nn.LayerNorm(width)}
        )
        widths = [width * 2**i for i in range(STAGES)]
        self.stages = nn.ModuleList(
            Stage(w, heads[i], window, ratio * w, depths[i], last=i == STAGES - 1)
            for i, w in enumerate(widths)
        )
        for i, w in enumerate(widths):
            self.add_module(f"norm{i}", nn.LayerNorm(w))
        nexts = [*widths[1:], widths[-1]]
        self.semantic_embed_w = nn.ModuleList(nn.Linear(2, w) for w in nexts)
        self.semantic_embed_b = nn.ModuleList(nn.Linear(2, w) for w in nexts)
        self.widths = widths

    def forward(self, planes: Tensor, stage: int, semantic_weight: float) -> Tensor:
        """Normalised [B, 3, H, W] to the normed map of `stage` [B, C, h, w]."""
        x = self.patch_embed["projection"](planes).permute(0, 2, 3, 1)
        x = self.patch_embed["norm"](x)
        steering = x.new_tensor([semantic_weight, 1 - semantic_weight])
        for i in range(stage):
            x = self.stages[i].downsample(self.stages[i].blocks(x))
            scale = F.softplus(self.semantic_embed_w[i](steering))
            x = x * scale + self.semantic_embed_b[i](steering)
        x = self.stages[stage].blocks(x)
        return getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2)


class SoliderNetwork(MapNetwork):
    """A SOLIDER Swin as a teacher network.

    Args:
        stage: 0 to 3; stage 2 has stride 16, stage 3 has stride 32.
    """

    def __init__(
        self, model: SoliderSwin, stage: int, semantic_weight: float, dtype: torch.dtype
    ) -> None:
        super().__init__(model, model.widths[stage], PATCH * 2**stage, dtype)
        self.stage, self.semantic_weight = stage, semantic_weight

    def read(self, planes: Tensor) -> Tensor:
        dense: Tensor = self.model(planes, self.stage, self.semantic_weight)
        return dense


def load_solider(state: dict[str, Any], source: Path) -> tuple[SoliderSwin, dict[str, int]]:
    """The Swin of a SOLIDER file, and what was left out. Raises ConfigError."""
    stripped = bare(state, source, droppable=DROPPED)
    rest = stripped.state
    width = tensor_of(rest, "patch_embed.projection.weight", source, 4).shape[0]
    table = "stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    tables = [tensor_of(rest, table.format(i), source, 2).shape for i in range(STAGES)]
    side = round(tables[0][0] ** 0.5)
    if side % 2 == 0 or any(width * 2**i % heads for i, (_, heads) in enumerate(tables)):
        raise ConfigError(f"{source}: {table.format(0)} is {list(tables[0])}: no table of a window")
    model = SoliderSwin(
        width,
        [count_of(rest, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(STAGES)],
        [heads for _, heads in tables],
        (side + 1) // 2,
        tensor_of(rest, "stages.0.blocks.0.ffn.layers.0.0.weight", source, 2).shape[0] // width,
    )
    load_strictly(model, rest, source)
    return model, stripped.dropped


def _windows(x: Tensor, size: int) -> Tensor:
    """[B, h, w, C] to [B * W, n, C], windows in row-major order."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)
