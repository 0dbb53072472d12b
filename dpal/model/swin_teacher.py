"""Teachers from timm's Swin family, read at one stage, at any input size.

A window stays as large as it was trained: a map that it does not tile is padded, never squeezed
into another window, so that one network serves base views and square composites alike.

Legend: B images, C channels, h x w map.
"""

import re

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.model.map_network import MapNetwork
from dpal.model.timm_import import timm


class SwinNetwork(MapNetwork):
    """A timm Swin read at one tap.

    Args:
        model: a Swin that takes any input size.
        tap: "norm" (last stage and the final norm) or "stage<k>" (output of stage k, from 0,
            before any norm; stage k has stride 4 * 2 ** k).
    """

    def __init__(self, model: nn.Module, tap: str, dtype: torch.dtype) -> None:
        count = len(model.layers)
        match = re.fullmatch(r"stage(\d+)", tap)
        if tap != "norm" and (match is None or int(match[1]) >= count):
            raise ConfigError(
                f"teacher.tap={tap!r}: accepted are 'norm' and 'stage0' to 'stage{count - 1}'"
            )
        self.stage = None if match is None else int(match[1])
        info = model.feature_info[count - 1 if self.stage is None else self.stage]
        super().__init__(model, info["num_chs"], info["reduction"], dtype)

    def read(self, planes: Tensor) -> Tensor:
        if self.stage is None:
            whole: Tensor = self.model.forward_features(planes)
            return whole.permute(0, 3, 1, 2)
        (dense,) = self.model.forward_intermediates(
            planes, indices=[self.stage], stop_early=True, intermediates_only=True
        )
        return dense


def is_swin(name: str) -> bool:
    """Whether a timm name is of a Swin or Swin V2."""
    return name.startswith(("swin_", "swinv2_")) and not name.startswith("swinv2_cr_")


def is_swin_model(model: nn.Module) -> bool:
    """Whether a timm model is a Swin or Swin V2."""
    families = (
        timm.models.swin_transformer.SwinTransformer,
        timm.models.swin_transformer_v2.SwinTransformerV2,
    )
    return isinstance(model, families)
