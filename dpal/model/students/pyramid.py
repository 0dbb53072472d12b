"""Swin and convolutional or hybrid students: timm networks whose last map becomes the tokens.

The last map has stride 32 (or 16). It is up-sampled to stride 16, so that every family answers on
the same token grid, and the global vector is the mean of the map as it left the network.

Legend: B images, H x W pixels, D channels of the last map, h x w its size, r = stride / 16.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.base.students import PATCH
from dpal.base.students import Student as StudentSpec
from dpal.model.students.drop_path import DropPath, use_given_draws
from dpal.model.students.interface import Student
from dpal.model.timm_import import timm
from dpal.model.tokens import Tokens

SWIN = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
}


class PyramidStudent(Student):
    """A timm network cut behind its last stage, with fresh weights.

    Batch norms, where it has them, take their statistics from one kind of view of one process at
    a time; those of the first process are the ones that are kept.

    Args:
        spec: the `student` section of a recipe, of the family `swin` or `timm`.

    Raises:
        ConfigError: timm has no such network, or one whose last map is of no use here.

    Source: Swin students of the reference (method: 1.1): window 7, average-pooled global vector,
    bicubic up-sampling of the stride-32 map.
    """

    def __init__(self, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        self.input_size = (spec.height, spec.width)
        self.net = _network(spec)
        last = self.net.feature_info[-1]
        self.embed_dim = int(last["num_chs"])
        self.stride = int(last["reduction"])
        if self.stride not in (PATCH, 2 * PATCH):
            raise ConfigError(
                f"student.name={spec.name!r}: its last map has stride {self.stride}; "
                "accepted are networks that end at stride 16 or 32"
            )
        self._try_a_crop()

    def forward(self, pixels: Tensor) -> Tokens:
        """Tokens of normalised float pixels [B, 3, H, W] (see `Student`)."""
        features = self.map_of(pixels)  # [B, D, h, w]
        rows, columns = self.grid_of(pixels.shape[2], pixels.shape[3])
        patches = upsample(features, self.stride // PATCH)[:, :, :rows, :columns]
        return Tokens(features.mean(dim=(2, 3)), patches.flatten(2).transpose(1, 2))

    def map_of(self, pixels: Tensor) -> Tensor:
        """The last map [B, D, h, w], after the network's final norm where it has one."""
        maps = self.net.forward_intermediates(
            pixels, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return maps[-1]

    @torch.no_grad()
    def _try_a_crop(self) -> None:
        """Raise ConfigError when the network is bound to the size that it was published with."""
        height, width = self.input_size[0] // 2, 3 * self.input_size[0] // 8  # a local crop
        training = self.training
        try:
            self.eval()(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, ValueError):
            raise ConfigError(
                f"student.name={self.spec.name!r} cannot take crops of {height}x{width} pixels; "
                "accepted are networks for images of any size"
            ) from None
        finally:
            self.train(training)

    @property
    def timm_module(self) -> nn.Module:
        """timm's network, without its head."""
        return self.net

    @contextmanager
    def traceable(self) -> Iterator[None]:
        """Within: what Swin computes from the size of a map is a constant of `input_size`.

        A tracer gets the making of masks wrong, and ONNX the rolling of a map by more than its
        own size.
        """
        blocks = [block for block in self.net.modules() if getattr(block, "dynamic_mask", False)]
        shifts = [block.shift_size for block in blocks]
        try:
            for block in blocks:
                block.attn_mask = block.get_attn_mask(device=self.device, dtype=torch.float32)
                sides = zip(block.shift_size, block.input_resolution, strict=True)
                block.shift_size = tuple(shift % side for shift, side in sides)
                block.dynamic_mask = False
            yield
        finally:
            for block, shift in zip(blocks, shifts, strict=True):
                block.attn_mask, block.shift_size, block.dynamic_mask = None, shift, True


def upsample(features: Tensor, factor: int) -> Tensor:
    """Map [B, D, h, w] at `factor` times its resolution, bicubic.

    Always by the whole factor: at sizes that the stride does not divide, the last cell reaches
    past the image, and what lies outside is cut off afterwards instead of squeezed in.
    """
    if factor == 1:
        return features
    size = (factor * features.shape[2], factor * features.shape[3])
    wide = F.interpolate(features.float(), size=size, mode="bicubic", align_corners=False)
    return wide.to(features.dtype)


def timm_name(spec: StudentSpec) -> str:
    """timm's name of the network behind a spec of the family `swin` or `timm`."""
    return SWIN.get(spec.name, spec.name)


def timm_arguments(spec: StudentSpec) -> dict[str, Any]:
    """Arguments of timm's constructor that decide what the network computes.

    Swin keeps windows of 7 x 7 in every stage and pads small maps to them, as detectors do; the
    shapes of its tensors are then those of any Swin with window 7, whatever the input size. timm
    shifts a map before it pads it, where other Swins pad first: near the padded edges their
    features differ from these a little.
    """
    if spec.family != "swin":
        return {}
    size = (spec.height, spec.width)
    return {"img_size": size, "always_partition": True, "strict_img_size": False}


def _network(spec: StudentSpec) -> nn.Module:
    name, arguments = timm_name(spec), timm_arguments(spec)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (nearest is {near[0]!r})" if near else ""
        raise ConfigError(f"student.name={name!r}: timm has no such network{hint}")
    options = {"pretrained": False, "num_classes": 0, **arguments}
    try:
        net = timm.create_model(name, drop_path_rate=spec.drop_path, **options)
    except TypeError:  # not every network knows stochastic depth
        net = timm.create_model(name, **options)
    use_given_draws(net)
    if spec.drop_path and not any(isinstance(module, DropPath) for module in net.modules()):
        raise ConfigError(
            f"student.drop_path={spec.drop_path} has no effect on {name}, which drops no paths; "
            "leave it out"
        )
    return _cut(net, name)


def _cut(net: nn.Module, name: str) -> nn.Module:
    """The network without its head. Raises ConfigError when timm cannot say where its maps are."""
    try:
        with torch.no_grad():
            net.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
        if net.feature_info[-1]["num_chs"]:
            return net
    except (AttributeError, AssertionError, NotImplementedError):
        pass
    raise ConfigError(
        f"student.name={name!r}: timm gives no intermediate maps of this network; accepted are "
        "networks with `forward_intermediates`"
    )
