"""From clean pixels to the network inputs of SAIP: noise, region image, scene.

Legend: B images, C local crops, H x W base view, h x w small image, S side of the scene; planes
are RGB in 0..1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dpal.augment import add_noise
from dpal.pixels import normalise_planes, planes_of
from dpal.views.render import PERSON_ALPHA

_SOLARISE_FROM = 128 / 255


class Inputs(NamedTuple):
    """ImageNet-normalised inputs.

    Attributes:
        globals: g1 of every sample, then g2 [2 B, 3, H, W].
        smalls: first local crop of every sample, then the second ..., last the region image
            [(C + 1) B, 3, h, w].
        scene: [B, 3, S, S].
    """

    globals: Tensor
    smalls: Tensor
    scene: Tensor


def network_inputs(
    globals_: Tensor, locals_: Tensor, background: Tensor, corners: Tensor, noise: Tensor
) -> Inputs:
    """Inputs of a batch.

    Args:
        globals_: uint8 [B, 2, H, W, 3].
        locals_: uint8 [B, C, h, w, 3].
        background: uint8 [B, S, S, 3].
        corners: int64 [B, 2, 2], (top, left) of the last local crop and of the region image.
        noise: float32 [B, 3 + C, 7], see `SaipPlan.noise`.
    """
    count = locals_.shape[1]
    base = _noisy(globals_.transpose(0, 1).flatten(0, 1), noise[:, :2])
    crops = _noisy(locals_.transpose(0, 1).flatten(0, 1), noise[:, 2 : 2 + count])
    behind = _noisy(background, noise[:, -1:])
    # Nearest, as in the reference: the region image is the noisy first view, not a view of its own.
    region = F.interpolate(base[: len(behind)], size=crops.shape[2:], mode="nearest")
    last = crops[-len(behind) :]
    scene = paste(paste(behind, last, corners[:, 0]), region, corners[:, 1])
    views = (base, torch.cat([crops, region]), scene)
    return Inputs(*(normalise_planes(planes) for planes in views))


def paste(scene: Tensor, person: Tensor, corners: Tensor) -> Tensor:
    """Blend persons [B, 3, h, w] into scenes [B, 3, S, S] at (top, left) corners [B, 2]."""
    height, width = person.shape[2:]
    rows = corners[:, :1] + torch.arange(height, device=scene.device)  # [B, h]
    columns = corners[:, 1:] + torch.arange(width, device=scene.device)  # [B, w]
    places = rows.unsqueeze(2) * scene.shape[3] + columns.unsqueeze(1)  # [B, h, w]
    places = places.flatten(1).unsqueeze(1).expand(-1, scene.shape[1], -1)  # [B, 3, h w]
    flat = scene.flatten(2)
    mixed = torch.lerp(flat.gather(2, places), person.flatten(2), PERSON_ALPHA)
    return flat.scatter(2, places, mixed).view_as(scene)


def solarise(planes: Tensor, chosen: Tensor) -> Tensor:
    """Invert what is at least half as bright as white, in the chosen [B] of planes [B, 3, H, W]."""
    inverted = torch.where(planes >= _SOLARISE_FROM, 1 - planes, planes)
    return torch.where(chosen.view(-1, 1, 1, 1) > 0, inverted, planes)


def _noisy(pixels: Tensor, noise: Tensor) -> Tensor:
    """Noisy planes of uint8 [V B, H, W, 3], view by view; noise [B, V, 7]."""
    rows = noise.transpose(0, 1).flatten(0, 1)  # [V B, 7]
    return solarise(add_noise(planes_of(pixels), rows[:, :-1]), rows[:, -1].to(pixels.device))
