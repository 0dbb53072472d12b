"""Samples that are not their picture's own bytes: persons cut out, and pictures encoded anew.

They are made when a picture is judged, and a second time when their shard is written: the same
picture, box and settings give the same bytes.

Legend: H, W height and width of a picture in pixels.
"""

from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.decode import Pixels, read_header
from data_tools.person_facts import moved, scaled
from data_tools.regions import decode_region
from data_tools.source import Corners
from dpal.base.errors import DataError
from dpal.base.inputs import Data
from dpal.views.specs import Box

CROP_QUALITY, CROP_SAMPLING = 95, "444"
JPEG_SAMPLING = "420"


class Made(NamedTuple):
    """A sample that is not its picture's own bytes; `facts` are in its pixels."""

    contents: bytes
    pixels: Pixels
    facts: dict[str, Any]


def sample_bytes(contents: bytes, box: Corners | None, data: Data) -> bytes:
    """The bytes of a sample from those of its picture. Raises DataError if it is not what it was.

    Args:
        box: the person; None for the whole picture.
    """
    if is_kept_whole(box, data):
        return contents
    header = read_header(contents)
    area = cut_of(box, data.margin, header.height, header.width)
    if area is None:
        raise DataError(f"box {box} lies outside its picture")
    left, top, right, bottom = area
    wanted = Box(top, left, bottom - top, right - left)
    region = decode_region(contents, wanted, data.max_pixels)
    top, left = top - region.top, left - region.left
    return _encoded(region.pixels[top:, left:][: wanted.height, : wanted.width], {}, data).contents


def made(pixels: Pixels, box: Corners | None, facts: dict[str, Any], data: Data) -> Made | None:
    """Cut, scaled and encoded as `data` asks; None when nothing of the box is in the picture."""
    area = cut_of(box, data.margin, *pixels.shape[:2])
    if area is None:
        return None
    left, top, right, bottom = area
    told = moved(facts, left, top, right - left, bottom - top)
    return _encoded(pixels[top:bottom, left:right], told, data)


def is_kept_whole(box: Corners | None, data: Data) -> bool:
    """Whether a sample is its picture's very bytes."""
    return box is None and data.encode == "keep"


def cut_of(
    box: Corners | None, margin: float, height: int, width: int
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in whole pixels of what `box` and its margin have in the picture."""
    if box is None:
        return 0, 0, width, height
    aside, above = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    if not np.isfinite((*box, aside, above, box[0] - aside, box[2] + aside)).all():
        return None
    left, top = max(int(np.floor(box[0] - aside)), 0), max(int(np.floor(box[1] - above)), 0)
    right = min(int(np.ceil(box[2] + aside)), width)
    bottom = min(int(np.ceil(box[3] + above)), height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _encoded(cut: Pixels, told: dict[str, Any], data: Data) -> Made:
    """A cut of a picture, scaled and encoded."""
    cut = np.ascontiguousarray(cut)  # [H, W, 3]
    quality, sampling = CROP_QUALITY, CROP_SAMPLING
    if data.encode == "jpeg":
        quality, sampling = data.jpeg_quality, JPEG_SAMPLING
        cut, told = _within(cut, told, data.max_side)
    contents = simplejpeg.encode_jpeg(
        cut, quality=quality, colorspace="RGB", colorsubsampling=sampling, fastdct=False
    )
    return Made(contents, cut, told)


def _within(pixels: Pixels, facts: dict[str, Any], side: int) -> tuple[Pixels, dict[str, Any]]:
    """Scaled down until neither side is longer than `side` pixels (0: any); facts as well."""
    height, width = pixels.shape[:2]
    if not side or max(height, width) <= side:
        return pixels, facts
    share = side / max(height, width)
    size = max(round(width * share), 1), max(round(height * share), 1)
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(smaller), scaled(facts, size[0] / width, size[1] / height)
