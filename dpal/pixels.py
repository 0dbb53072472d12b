"""From uint8 views to what networks take in: planes, colour noise, normalisation.

Legend: B images of H x W pixels.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpal.augment import add_noise
from dpal.base.teachers import IMAGENET_MEAN, IMAGENET_STD


def planes_of(pixels: Tensor) -> Tensor:
    """uint8 pixels [B, H, W, 3] as RGB planes in 0..1, float32 [B, 3, H, W]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def normalise(pixels: Tensor, shrink: int = 1) -> Tensor:
    """uint8 pixels [B, H, W, 3] as the student's input (see `normalise_planes`)."""
    return normalise_planes(planes_of(pixels), shrink)


def normalise_planes(planes: Tensor, shrink: int = 1) -> Tensor:
    """RGB planes in 0..1 [B, 3, H, W] to ImageNet-normalised [B, 3, H / shrink, W / shrink].

    Shrinking is the exact mean of `shrink` x `shrink` pixels.
    """
    if shrink > 1:
        planes = F.avg_pool2d(planes, shrink)
    mean = planes.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = planes.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (planes - mean) / std


def student_pixels(
    views: np.ndarray | Tensor, noise: np.ndarray, shrink: int, device: torch.device
) -> Tensor:
    """Noisy, normalised pixels, float32 [B, 3, H / shrink, W / shrink].

    Args:
        views: uint8 [B, H, W, 3].
        noise: rows of `views.Photometric`, float32 [B, 6].
        shrink: see `normalise_planes`.
    """
    planes = planes_of(torch.as_tensor(views).to(device))
    return normalise_planes(add_noise(planes, torch.from_numpy(noise)), shrink)


def noisy_pixels(views: Tensor, noise: Tensor) -> Tensor:
    """Noise [B, 6] on views uint8 [B, H, W, 3], rounded to uint8: what a teacher takes in."""
    noisy = add_noise(planes_of(views), noise).mul_(255).round_().clamp_(0, 255)
    return noisy.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
