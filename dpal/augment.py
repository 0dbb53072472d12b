"""Colour noise on pixels, batched on the device of the model that sees them.

The parameters are drawn per sample by `ViewPlan.photometric`; here they are only applied, so the
result depends neither on the batch a sample is in nor on the rank it is on.

Legend: B images of H x W pixels, RGB planes in 0..1; b images worked on at once.
"""

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_CACHED_NUMBERS = 1 << 17  # what a CPU core works on at once, so that it stays in its cache


def add_noise(planes: Tensor, noise: Tensor) -> Tensor:
    """Apply `views.Photometric` rows [B, 6] to planes [B, 3, H, W] in 0..1.

    Order: brightness, contrast, saturation, hue, grey, blur. `noise` may stay on the CPU: that
    spares a device from waiting until it is known which images are blurred.
    """
    blurred = noise[:, 5].nonzero().flatten().to(planes.device)
    noise = noise.to(planes.device)
    noisy = torch.empty_like(planes)
    for rows in _portions(planes):
        noisy[rows] = _recolour(planes[rows], noise[rows, :5])
    if len(blurred):
        noisy[blurred] = blur(noisy[blurred], noise[blurred, 5]).to(noisy.dtype)
    return noisy


def luma(planes: Tensor) -> Tensor:
    """ITU-R 601 luma [B, 1, H, W]."""
    red, green, blue = planes.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def shift_hue(planes: Tensor, hue: Tensor) -> Tensor:
    """Turn the HSV hue by `hue` turns [B, 1, 1, 1], keeping saturation and value."""
    red, green, blue = planes.split(1, dim=1)  # [B, 1, H, W]
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # The sextant formula of the channel that is largest; on a tie, of the first.
    of_blue = torch.where(green == value, blue - red, red - green)
    apart = torch.where(red == value, green - blue, of_blue)
    start = torch.where(green == value, 2.0, 4.0).masked_fill_(red == value, 0.0)
    angle = (apart / chroma.clamp_min(1e-8)).add_(start).add_(6 * hue)  # in sixths of a turn
    offsets = planes.new_tensor((5.0, 3.0, 1.0)).view(1, 3, 1, 1)
    k = angle + offsets  # [B, 3, H, W]
    k -= (k / 6).floor_().mul_(6)  # k modulo 6; `remainder` is slow on CPUs
    share = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # min(k, 4 - k) in 0..1
    return share.mul_(chroma).neg_().add_(value)


def blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma per image [B], in pixels; 0 leaves an image as it is.

    Two banded matrix products instead of a depthwise convolution, which is slow on CPUs.
    """
    rows = _blur_matrix(planes.shape[2], sigma)  # [B, H, H]
    columns = _blur_matrix(planes.shape[3], sigma)  # [B, W, W]
    return rows.unsqueeze(1) @ planes @ columns.unsqueeze(1).transpose(2, 3)


def _recolour(planes: Tensor, noise: Tensor) -> Tensor:
    """Everything but the blur: planes [b, 3, H, W], noise [b, 5]."""
    brightness, contrast, saturation, hue, grey = (
        column.view(-1, 1, 1, 1) for column in noise.unbind(dim=1)
    )
    planes = (planes * brightness).clamp_(0, 1)
    mean = luma(planes).mean(dim=(2, 3), keepdim=True)
    planes = planes.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    planes = torch.lerp(luma(planes), planes, saturation).clamp_(0, 1)
    planes = shift_hue(planes, hue)
    return torch.where(grey > 0, luma(planes), planes)


def _portions(planes: Tensor) -> list[slice]:
    size = planes.shape[0]
    if planes.device.type == "cpu":
        size = max(1, _CACHED_NUMBERS // planes[0].numel())
    return [slice(start, start + size) for start in range(0, planes.shape[0], size)]


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    position = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = (position.view(-1, 1) - position).square()  # [size, size]
    width = sigma.view(-1, 1, 1).clamp_min(1e-3)
    return (-distance / (2 * width.square())).softmax(dim=-1)
