"""Teachers from timm's convolutional and hybrid networks, read at one stage, at any input size.

What such a network is asked for is timm's own: the map that its classifier would pool, and what
that classifier would see of it.

Legend: B images, C channels, h x w map.
"""

import re

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.model.map_network import MapNetwork

CELLS = (2, 3)  # of the maps that a network is tried on; no network has so few channels
ONE_SIZE = (
    "takes one input size only; accepted are vision transformers that take any (timm: "
    "dynamic_img_size), Swins and convolutional networks"
)
_COUNTER = ".num_batches_tracked"


class ConvNetwork(MapNetwork):
    """A timm network of one map per stage, read at one tap.

    Args:
        model: a network without its classifier.
        tap: "norm" (the last map; the global vector is what the network pools of it, with its
            final norm where it has one) or "stage<k>" (the last map of stride 4 * 2 ** k; the
            global vector is its mean).
        name: of the network, for errors.

    Raises:
        ConfigError: a network without such maps, or one that is bound to an input size.
    """

    def __init__(self, model: nn.Module, tap: str, dtype: torch.dtype, name: str) -> None:
        stages = _stages(model, name)
        match = re.fullmatch(r"stage(\d+)", tap)
        stage = None if match is None else int(match[1])
        if tap != "norm" and stage not in stages:
            accepted = ", ".join(f"'stage{k}'" for k in stages)
            raise ConfigError(f"teacher.tap={tap!r}: accepted of {name} are 'norm', {accepted}")
        chosen = max(stages) if stage is None else stage
        self.index = None if stage is None else stages[stage]
        self.pools = self.channels_last = False
        super().__init__(model, 0, 4 * 2**chosen, dtype)
        self._try(name)

    def read(self, planes: Tensor) -> Tensor:
        if self.index is None:
            whole: Tensor = self.model.forward_features(planes)
            return whole.permute(0, 3, 1, 2) if self.channels_last else whole
        (dense,) = self.model.forward_intermediates(
            planes, indices=[self.index], stop_early=True, intermediates_only=True
        )
        return dense

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised float [B, 3, H, W] to a global vector [B, C] and a map [B, C, h, w]."""
        if not self.pools:
            return super().__call__(planes)
        dense = self.read(planes.to(self.dtype))
        return self._pooled(dense).float(), dense.float()

    def _pooled(self, dense: Tensor) -> Tensor:
        """What the classifier would see of the last map [B, C, h, w]."""
        whole = dense.permute(0, 2, 3, 1) if self.channels_last else dense
        pooled: Tensor = self.model.forward_head(whole, pre_logits=True)
        return pooled

    @torch.inference_mode()
    def _try(self, name: str) -> None:
        """Find out the width, and how the network pools: as its own, or else by the mean."""
        size = tuple(cells * self.multiple for cells in CELLS)
        try:
            dense = self.read(torch.zeros(1, 3, *size, dtype=self.dtype))
        except (AssertionError, RuntimeError, ValueError, IndexError):
            raise ConfigError(f"teacher.name={name!r} {ONE_SIZE}") from None
        if self.index is None and dense.ndim == 4 and tuple(dense.shape[1:3]) == CELLS:
            self.channels_last, dense = True, dense.permute(0, 3, 1, 2)
        if dense.ndim != 4 or tuple(dense.shape[2:]) != CELLS:
            raise ConfigError(
                f"teacher.name={name!r}: of {size[0]}x{size[1]} pixels it makes {[*dense.shape]}; "
                f"accepted is a map of {CELLS[0]}x{CELLS[1]} cells of {self.multiple} pixels"
            )
        self.width = int(dense.shape[1])
        self.pools = self.index is None and self._pools_to_the_width(dense)

    def _pools_to_the_width(self, dense: Tensor) -> bool:
        """Not so where a layer behind the pooling makes another space of it (MobileNetV3)."""
        try:
            pooled = self._pooled(dense)
        except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError):
            return False
        return tuple(pooled.shape) == (1, self.width)


def with_counters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with the batch norms' step counters, which older files lack and no forward reads."""
    counters = {key: value for key, value in model.state_dict().items() if key.endswith(_COUNTER)}
    return {**counters, **state}


def _stages(model: nn.Module, name: str) -> dict[int, int]:
    """Place in `feature_info` of the last map of stride 4 * 2 ** k, by k."""
    info = getattr(model, "feature_info", None) or []
    places = {int(row["reduction"]): place for place, row in enumerate(info)}
    stages = {k: places[4 * 2**k] for k in range(4) if 4 * 2**k in places}
    if len(places) < 2 or not stages or not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"teacher.name={name!r}: {type(model).__name__} has no maps of stride 4 to 32; "
            "accepted are timm's vision transformers, Swins and convolutional networks"
        )
    return stages
