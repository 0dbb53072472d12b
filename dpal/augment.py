"""Colour noise on the student's pixels, batched on the training device.

The parameters are drawn per sample by `ViewPlan.photometric`; here they are only applied, so the
result depends neither on the batch a sample is in nor on the rank it is on.

Legend: B images of H x W pixels, RGB planes in 0..1.
"""

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def add_noise(planes: Tensor, noise: Tensor) -> Tensor:
    """Apply `views.Photometric` rows [B, 6] to planes [B, 3, H, W] in 0..1.

    Order: brightness, contrast, saturation, hue, grey, blur.
    """
    brightness, contrast, saturation, hue, grey, sigma = (
        column.view(-1, 1, 1, 1) for column in noise.unbind(dim=1)
    )
    planes = (planes * brightness).clamp(0, 1)
    mean = luma(planes).mean(dim=(2, 3), keepdim=True)
    planes = (mean + contrast * (planes - mean)).clamp(0, 1)
    grey_planes = luma(planes)
    planes = (grey_planes + saturation * (planes - grey_planes)).clamp(0, 1)
    planes = shift_hue(planes, hue)
    planes = torch.where(grey > 0, luma(planes).expand_as(planes), planes)
    return blur(planes, sigma.flatten())


def luma(planes: Tensor) -> Tensor:
    """ITU-R 601 luma [B, 1, H, W]."""
    weights = planes.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (planes * weights).sum(dim=1, keepdim=True)


def shift_hue(planes: Tensor, hue: Tensor) -> Tensor:
    """Turn the HSV hue by `hue` turns [B, 1, 1, 1], keeping saturation and value."""
    value, argmax = planes.max(dim=1, keepdim=True)
    chroma = value - planes.min(dim=1, keepdim=True).values
    red, green, blue = planes.unbind(dim=1)
    safe = chroma.squeeze(1).clamp_min(1e-8)
    sextants = torch.stack(
        [(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4], dim=1
    )
    angle = sextants.gather(1, argmax) + 6 * hue  # [B, 1, H, W], in sixths of a turn
    offsets = planes.new_tensor((5.0, 3.0, 1.0)).view(1, 3, 1, 1)
    k = (angle + offsets) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma per image [B], in pixels; 0 leaves an image as it is.

    Two banded matrix products instead of a depthwise convolution, which is slow on CPUs.
    """
    rows = _blur_matrix(planes.shape[2], sigma)  # [B, H, H]
    columns = _blur_matrix(planes.shape[3], sigma)  # [B, W, W]
    return rows.unsqueeze(1) @ planes @ columns.unsqueeze(1).transpose(2, 3)


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = (position.view(-1, 1) - position).square()  # [size, size]
    width = sigma.view(-1, 1, 1).clamp_min(1e-3)
    return (-distance / (2 * width.square())).softmax(dim=-1)
