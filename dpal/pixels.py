"""From uint8 views to a student's input: planes, colour noise, normalisation."""

import numpy as np
import torch
from torch import Tensor

from dpal.augment import add_noise
from dpal.model.student import normalise_planes, planes_of


def student_pixels(
    views: np.ndarray, noise: np.ndarray, shrink: int, device: torch.device
) -> Tensor:
    """Noisy, normalised pixels, float32 [B, 3, H / shrink, W / shrink].

    Args:
        views: uint8 [B, H, W, 3].
        noise: rows of `views.Photometric`, float32 [B, 6].
        shrink: see `normalise_planes`.
    """
    planes = planes_of(torch.from_numpy(views).to(device))
    return normalise_planes(add_noise(planes, torch.from_numpy(noise)), shrink)
