"""Pillow's bicubic resize of a box, for many images at once, with the same pixels on any device.

Pillow filters along one axis, rounds to uint8, and filters along the other. A pixel is a sum of
8-bit values times whole numbers (weights in units of 2^-22), so it has one right value, and the
sums here are exact: float32 holds whole numbers up to 2^24, and each weight is cut in two parts
whose sums stay below that. Which axis comes first depends on Pillow's version: `dpal.pass_order`.

Legend: P pixels of all pictures, n views of h x w, cut from windows of at most H x W source pixels,
K taps: source pixels that one output pixel may depend on.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpal.batch import Pictures

FRACTION_BITS = 22  # libImaging/Resample.c: PRECISION_BITS
REACH = 2.0  # of the cubic, in output pixels when shrinking, else in source pixels
SHARPNESS = -0.5  # the parameter a of the cubic (Keys 1981, eq. 8)
_LARGEST_PART = 12  # bits of a low part; the high part then has as many
_MOST_TAPS = 512  # beyond, sums of parts might not fit into float32
_NUMBERS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 25}  # of window pixels, bounds the memory


# From sizes of images [n, 2] and of views: for which of them y is filtered before x, bool [n].
PassOrder = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class DevicePictures(NamedTuple):
    """Images of any size on a device.

    Attributes:
        pixels: uint8 [P, 3], rows of the first image, then of the second ...
        starts: where each image begins in `pixels`, int64.
        sizes: height and width of each image, int64.
    """

    pixels: Tensor
    starts: np.ndarray
    sizes: np.ndarray


class _Axis(NamedTuple):
    """One axis of n boxes; all are arrays [n] on the host.

    Attributes:
        begin, scale, reach: the box's start, source pixels per output pixel, and the filter's half
            width in source pixels, float64.
        limit: where the image ends, int64.
        first, count: the window: source pixels that any output pixel depends on, int64.
    """

    begin: np.ndarray
    scale: np.ndarray
    reach: np.ndarray
    limit: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def of(self, rows: np.ndarray) -> "_Axis":
        return _Axis(*(values[rows] for values in self))

    @property
    def taps(self) -> int:
        return int(np.ceil(self.reach.max())) * 2 + 1


def upload(pictures: Pictures, device: torch.device) -> DevicePictures:
    """The same images on a device."""
    sizes = pictures.sizes.astype(np.int64)
    ends = np.cumsum(sizes[:, 0] * sizes[:, 1])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return DevicePictures(torch.from_numpy(pictures.pixels).to(device), starts, sizes)


@torch.no_grad()
def render_boxes(
    pictures: DevicePictures, numbers: np.ndarray, size: tuple[int, int], order: PassOrder
) -> Tensor:
    """What `dpal.views.render.render` gives, uint8 [n, h, w, 3].

    Args:
        numbers: int [n, 6]: index of the picture, top, left, height and width of the box, flip.
        size: h and w.
        order: of the Pillow that the others render with, see `dpal.pass_order`.
    """
    # A shortened product (TF32, bfloat16) would round what must be exact.
    assert torch.get_float32_matmul_precision() == "highest"
    device, numbers = pictures.pixels.device, numbers.astype(np.int64)
    index, top, left, height, width, _flip = numbers.T
    down_first = order(pictures.sizes[index], size)
    limits = pictures.sizes[index]  # [n, 2]
    rows = _axis(top, height, limits[:, 0], size[0])
    columns = _axis(left, width, limits[:, 1], size[1])
    views = torch.empty((len(numbers), *size, 3), dtype=torch.uint8, device=device)
    # The products' exactness is that of float32, also within a forward in bf16.
    with torch.autocast(device.type, enabled=False):
        for down, chosen in (
            (True, np.flatnonzero(down_first)),
            (False, np.flatnonzero(~down_first)),
        ):
            for part in _portions(chosen, rows.count, columns.count, device):
                drawn = _render_portion(
                    pictures, numbers[part], rows.of(part), columns.of(part), size, down
                )
                views[torch.from_numpy(part).to(device)] = drawn
    return views


def _render_portion(
    pictures: DevicePictures,
    numbers: np.ndarray,
    rows: _Axis,
    columns: _Axis,
    size: tuple[int, int],
    down_first: bool,
) -> Tensor:
    device = pictures.pixels.device
    flips = torch.from_numpy(numbers[:, 5] > 0).to(device)
    across = _weights(columns, size[1], flips)  # [n, w, W]
    down = _weights(rows, size[0], torch.zeros_like(flips))  # [n, h, H]
    windows = _windows(pictures, numbers[:, 0], rows, columns)  # [n, H, W, 3]
    lines = windows.transpose(2, 3).float()  # [n, H, 3, W]

    def along_x(lines: Tensor) -> Tensor:  # [n, y, 3, W] -> [n, y, 3, w]
        flat = lines.flatten(1, 2)
        narrow = _filtered(
            across, columns.taps, lambda part: flat.to(part.dtype) @ part.transpose(1, 2)
        )
        return narrow.unflatten(1, lines.shape[1:3])

    def along_y(lines: Tensor) -> Tensor:  # [n, H, 3, x] -> [n, h, 3, x]
        flat = lines.flatten(2)
        low = _filtered(down, rows.taps, lambda part: part @ flat.to(part.dtype))
        return low.unflatten(2, lines.shape[2:])

    small = along_x(along_y(lines)) if down_first else along_y(along_x(lines))
    return small.transpose(2, 3).to(torch.uint8)  # [n, h, w, 3]


def _filtered(weights: Tensor, taps: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Pixels of 0..255, in float32: the product with whole weights, rounded as Pillow does.

    The sum of one part is a whole number of at most 255 * taps * 2^(bits - 1) <= 2^24, the sum of
    the other is smaller; so both are exact in whatever order they are added.
    """
    if taps > _MOST_TAPS:
        total = product(weights.double()).to(torch.int64)
    else:
        bits = min(_LARGEST_PART, int(math.log2(2**25 / (255 * taps))))
        high = (weights / 2**bits).round_()
        low = weights - high * 2**bits
        total = product(high).to(torch.int32).mul_(2**bits).add_(product(low).to(torch.int32))
    half = 1 << (FRACTION_BITS - 1)
    return total.add_(half).bitwise_right_shift_(FRACTION_BITS).clamp_(0, 255).float()


def _weights(axis: _Axis, size: int, flips: Tensor) -> Tensor:
    """Weights of the window's pixels for every output pixel, in 2^-22, float32 [n, size, window].

    As in libImaging/Resample.c, operation by operation, in float64: the cubic around the centre of
    an output pixel, cut at the image's edges, divided by its sum, rounded half away from zero.
    """
    device, taps = flips.device, axis.taps
    begin, scale, reach, limit, first, _count = (
        torch.from_numpy(values).to(device).view(-1, 1) for values in axis
    )
    place = torch.arange(size, device=device)
    place = torch.where(flips.view(-1, 1), size - 1 - place, place)  # [n, size]
    centre = begin + (place + 0.5) * scale
    low = (centre - reach + 0.5).to(torch.int64).clamp_min(0)
    high = torch.minimum((centre + reach + 0.5).to(torch.int64), limit)
    at = low.unsqueeze(2) + torch.arange(taps, device=device)  # [n, size, K]
    shrink = (1.0 / scale.clamp_min(1.0)).unsqueeze(2)
    value = _cubic((at - centre.unsqueeze(2) + 0.5) * shrink)
    value = torch.where(at < high.unsqueeze(2), value, 0.0)
    total = torch.zeros_like(centre)
    for tap in value.unbind(2):  # from left to right, as the order of a sum decides its last bit
        total = total + tap
    scaled = value / total.unsqueeze(2) * (1 << FRACTION_BITS)
    whole = torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc().float()
    width = int(axis.count.max())
    dense = whole.new_zeros((*place.shape, width + taps))
    return dense.scatter_(2, at - first.unsqueeze(2), whole)[:, :, :width]


def _cubic(distance: Tensor) -> Tensor:
    """The cubic convolution kernel (Keys 1981, eq. 4), float64."""
    x, a = distance.abs(), SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < REACH, far, 0.0))


def _axis(begin: np.ndarray, length: np.ndarray, limit: np.ndarray, size: int) -> _Axis:
    scale = length / size
    reach = REACH * np.maximum(scale, 1.0)
    first = (begin + 0.5 * scale - reach + 0.5).astype(np.int64).clip(0)
    last = (begin + (size - 0.5) * scale + reach + 0.5).astype(np.int64)
    return _Axis(
        begin.astype(np.float64), scale, reach, limit, first, np.minimum(last, limit) - first
    )


def _windows(pictures: DevicePictures, index: np.ndarray, rows: _Axis, columns: _Axis) -> Tensor:
    """Source pixels of every window, uint8 [n, H, W, 3]; what is beyond one has no weight."""
    device = pictures.pixels.device
    lines = rows.first[:, None] + np.arange(rows.count.max())  # [n, H]
    lines = np.minimum(lines, rows.limit[:, None] - 1)
    across = columns.first[:, None] + np.arange(columns.count.max())  # [n, W]
    across = np.minimum(across, columns.limit[:, None] - 1)
    starts = pictures.starts[index, None] + lines * pictures.sizes[index, 1, None]
    at = (
        torch.from_numpy(starts).to(device)[:, :, None]
        + torch.from_numpy(across).to(device)[:, None]
    )
    return pictures.pixels[at]


def _portions(
    chosen: np.ndarray, heights: np.ndarray, widths: np.ndarray, device: torch.device
) -> Iterator[np.ndarray]:
    """Chosen rows, some at once: of windows of like size, so that little of them is padding."""
    most = _NUMBERS_AT_ONCE.get(device.type, _NUMBERS_AT_ONCE["cuda"])
    portion: list[int] = []
    height = width = 0
    for row in chosen[np.argsort((heights * widths)[chosen], kind="stable")].tolist():
        high, wide = max(height, int(heights[row])), max(width, int(widths[row]))
        if portion and 3 * high * wide * (len(portion) + 1) > most:
            yield np.array(portion)
            portion, high, wide = [], int(heights[row]), int(widths[row])
        portion.append(row)
        height, width = high, wide
    if portion:
        yield np.array(portion)
