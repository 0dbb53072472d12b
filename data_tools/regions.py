"""Only the pixels of a box, from an image that may be much larger than it.

Legend: h, w height and width of what is returned; H, W of the whole upright image.
"""

from typing import NamedTuple

import numpy as np

from data_tools.decode import Pixels, decode_rgb, upright
from data_tools.image_header import SWAPPED, ImageHeader, read_header, require_size
from data_tools.jpeg_region import StoredBox, decode_part
from dpal.base.errors import DataError
from dpal.base.telemetry import Telemetry
from dpal.views.specs import Box

# Chroma is interpolated from the neighbours of a sample, so a box is decoded with a rim of them;
# where the rim ends, the decoder knows no neighbour and repeats the last sample.
_RIM = 2


class Region(NamedTuple):
    """A part of an image.

    Attributes:
        pixels: uint8 [h, w, 3], upright; at least the box that was asked for.
        top: rows above it, in pixels of the image divided by `shrink`.
        left: columns beside it, likewise.
        shrink: 1, 2, 4 or 8: the image's sides were divided by it while decoding.
    """

    pixels: Pixels
    top: int
    left: int
    shrink: int


def decode_region(
    data: bytes,
    box: Box,
    max_pixels: int,
    *,
    at_least: tuple[int, int] | None = None,
    telemetry: Telemetry | None = None,
    out: Pixels | None = None,
) -> Region:
    """The pixels of `box`, a rectangle of the upright image.

    Sequential JPEGs are decoded in part, all else whole. Without `at_least` the pixels inside the
    box are exactly those of `decode_rgb`. Damage outside of what is read is not noticed.

    Args:
        at_least: height and width the caller will resize the box to. The image is halved while
            decoding as long as the box keeps this size, which is faster and gives slightly other
            pixels: not for views whose targets are cached.
        out: flat contiguous uint8 scratch, whose beginning is decoded into when it is long enough.

    Raises:
        DataError: as `decode_rgb`, and when the box leaves the image.
        ValueError: when `out` is something else.
    """
    if out is not None and (out.ndim != 1 or out.dtype != np.uint8 or not out.flags.c_contiguous):
        raise ValueError(f"out is {out.dtype} {out.shape}: accepted is flat contiguous uint8")
    header = read_header(data)
    require_size(header, max_pixels)
    if not (
        0 <= box.top < box.top + box.height <= header.height
        and 0 <= box.left < box.left + box.width <= header.width
    ):
        raise DataError(f"{box} is not inside an image of {header.width} x {header.height} pixels")
    if header.mcu is not None:
        region = _part(data, header, box, _shrink(box, at_least), out)
        if region is not None:
            return region
    return Region(decode_rgb(data, max_pixels, telemetry=telemetry, out=out), 0, 0, 1)


def _shrink(box: Box, at_least: tuple[int, int] | None) -> int:
    if at_least is None:
        return 1
    fits = (n for n in (8, 4, 2) if box.height >= n * at_least[0] and box.width >= n * at_least[1])
    return next(fits, 1)


def _part(
    data: bytes, header: ImageHeader, box: Box, shrink: int, out: Pixels | None
) -> Region | None:
    """The box and a rim, at `shrink`; None where it has to be decoded whole."""
    assert header.mcu is not None
    size = header.height, header.width
    stored = _turned(StoredBox(*box), size, header.orientation)
    height, width = size[::-1] if header.orientation in SWAPPED else size
    limits = -(-height // shrink), -(-width // shrink)
    top, bottom = _span(stored.top, stored.height, shrink, header.mcu[0], limits[0])
    left, right = _span(stored.left, stored.width, shrink, header.mcu[1], limits[1])
    part = StoredBox(top, left, bottom - top, right - left)
    if (part.height, part.width) == limits and shrink == 1:
        return None  # nothing is spared, and the whole decoder is the newer library
    pixels = decode_part(data, (height, width), part, shrink, out)
    if pixels is None:
        return None
    whole = limits[::-1] if header.orientation in SWAPPED else limits
    place = _upright_box(part, whole, header.orientation)
    return Region(upright(pixels, header.orientation), place.top, place.left, shrink)


def _span(start: int, length: int, shrink: int, mcu: int, limit: int) -> tuple[int, int]:
    """First and last + 1 of what is decoded along one side, in shrunk pixels.

    It starts with an MCU, as libjpeg-turbo demands beside a box and as its rows are only exact
    then above one (issue 915 of libjpeg-turbo).
    """
    step = max(mcu // shrink, 1)
    first = max(start // shrink - _RIM, 0) // step * step
    return first, min(-(-(start + length) // shrink) + _RIM, limit)


def _turned(box: StoredBox, size: tuple[int, int], orientation: int) -> StoredBox:
    """Where a box of the upright image of `size` lies in the stored one (TIFF 6.0, tag 274)."""
    top, left, height, width = box
    if orientation in (3, 4, 7, 8):
        top = size[0] - top - height
    if orientation in (2, 3, 6, 7):
        left = size[1] - left - width
    if orientation in SWAPPED:
        return StoredBox(left, top, width, height)
    return StoredBox(top, left, height, width)


def _upright_box(box: StoredBox, size: tuple[int, int], orientation: int) -> StoredBox:
    """Where a box of the stored image lies in the upright one of `size`: undoes `_turned`."""
    top, left, height, width = box
    if orientation in SWAPPED:
        top, left, height, width = left, top, width, height
    if orientation in (3, 4, 7, 8):
        top = size[0] - top - height
    if orientation in (2, 3, 6, 7):
        left = size[1] - left - width
    return StoredBox(top, left, height, width)
