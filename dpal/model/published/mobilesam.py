"""MobileSAM's image encoder as a teacher: TinyViT with a neck, at any input size.

The file's encoder is timm's TinyViT under other names, with two differences: the last merging
keeps its stride (so that a map has stride 16), and a neck brings it to SAM's 256 channels.
A file of MobileSAM also holds SAM's prompt encoder and mask decoder; they are left out.

Legend: B images, C channels of the neck, h x w map.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.model.map_network import MapNetwork
from dpal.model.timm_import import timm
from dpal.model.weights import bare, count_of, load_strictly, tensor_of

ENCODER = "image_encoder."
DROPPED = ("mask_decoder.", "prompt_encoder.", "head.", "norm_head.")
STAGES = 4
STRIDE = 16


class Encoder(nn.Module):
    """TinyViT and SAM's neck: normalised [B, 3, H, W] to a map [B, C, H / 16, W / 16]."""

    def __init__(self, tiny: nn.Module, channels: int) -> None:
        super().__init__()
        self.patch_embed, self.stages = tiny.patch_embed, tiny.stages
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        norm = timm.layers.LayerNorm2d
        self.neck = nn.Sequential(
            nn.Conv2d(tiny.num_features, channels, 1, bias=False),
            norm(channels, eps=1e-6),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(channels, eps=1e-6),
        )

    def forward(self, planes: Tensor) -> Tensor:
        return self.neck(self.stages(self.patch_embed(planes)))


def mobilesam_network(model: Encoder, dtype: torch.dtype) -> MapNetwork:
    """The encoder as a teacher network."""
    return MapNetwork(model, model.neck[0].out_channels, STRIDE, dtype)


def load_mobilesam(state: dict[str, Any], source: Path) -> tuple[Encoder, dict[str, int]]:
    """The encoder of a MobileSAM file, and what was left out. Raises ConfigError."""
    stripped = bare(state, source, prefixes=("module.", ENCODER), droppable=DROPPED)
    rest = stripped.state
    widths = [tensor_of(rest, "patch_embed.seq.2.c.weight", source, 4).shape[0]]
    for i in range(STAGES - 1):
        widths.append(tensor_of(rest, f"layers.{i}.downsample.conv3.c.weight", source, 4).shape[0])
    # stage 0 is convolutional; its window and heads are never used
    biases = [torch.Size((1, 1))]
    for i in range(1, STAGES):
        key = f"layers.{i}.blocks.0.attn.attention_biases"
        biases.append(tensor_of(rest, key, source, 2).shape)
        if widths[i] % biases[i][0] or round(biases[i][1] ** 0.5) ** 2 != biases[i][1]:
            raise ConfigError(f"{source}: {key} is {list(biases[i])}: no table of a window")
    tiny = timm.models.tiny_vit.TinyVit(
        num_classes=0,
        embed_dims=tuple(widths),
        depths=tuple(count_of(rest, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(STAGES)),
        num_heads=tuple(shape[0] for shape in biases),
        window_sizes=tuple(round(shape[1] ** 0.5) for shape in biases),
    )
    neck = tensor_of(rest, "neck.0.weight", source, 4)
    model = Encoder(tiny, neck.shape[0])
    load_strictly(model, rest, source, name_in_file=file_name)
    return model, stripped.dropped


def file_name(key: str) -> str:
    """The file's name of a tensor of `Encoder`.

    A merging stands before its stage here and behind the previous one in the file.
    """
    if match := re.match(r"patch_embed\.conv(\d)(.*)", key):
        key = f"patch_embed.seq.{2 * int(match[1]) - 2}{match[2]}"
    elif match := re.match(r"stages\.(\d)\.downsample(.*)", key):
        key = f"layers.{int(match[1]) - 1}.downsample{match[2]}"
    return re.sub(r"^stages\.", "layers.", key).replace(".conv.", ".c.")
