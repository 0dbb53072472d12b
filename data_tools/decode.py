"""Image bytes to RGB pixels: sizes come from the header, before anything is decoded.

simplejpeg decodes JPEG; what it refuses (recoverable damage) and PNG go to Pillow.

Legend: H, W height and width of the upright image.
"""

import io
import struct
import warnings
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_tools.image_header import SWAPPED, ImageHeader, read_header, require_size, sniff
from dpal.base.errors import DataError
from dpal.base.telemetry import DECODE_FALLBACK, Telemetry

__all__ = ["ImageHeader", "Pixels", "decode_rgb", "read_header", "sniff"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_rgb(
    data: bytes, max_pixels: int, *, telemetry: Telemetry | None = None, out: Pixels | None = None
) -> Pixels:
    """Upright RGB pixels of a JPEG or PNG: uint8 [H, W, 3].

    Args:
        out: memory to decode into, which spares a third of the time of a small image: either
            [H, W, 3], used when the image has exactly this size, or flat scratch, of whose
            beginning the result is a view when it is long enough. Otherwise the result is a new
            array: `np.shares_memory` tells.

    Raises:
        DataError: when it cannot be decoded, or has more than `max_pixels` by its header.
        ValueError: when `out` is not contiguous uint8 of 1 or 3 dimensions.
    """
    header = read_header(data)
    require_size(header, max_pixels)
    target = _target(out, header) if out is not None else None
    if header.kind == "jpg":
        try:
            if header.orientation == 1:
                pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=target)
                return pixels
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        except (ValueError, KeyError):
            if telemetry is not None:
                telemetry.report(DECODE_FALLBACK, 1)
            pixels = decode_pillow(data, header)
    else:
        pixels = decode_pillow(data, header)
    pixels = upright(pixels, header.orientation)
    if pixels.shape[:2] != (header.height, header.width):
        raise DataError("image is not decodable: its headers contradict each other")
    if target is None:
        return np.ascontiguousarray(pixels)
    target[...] = pixels
    return target


def _target(out: Pixels, header: ImageHeader) -> Pixels | None:
    """The part of `out` that the image's pixels go to; None if they do not fit."""
    if out.dtype != np.uint8 or out.ndim not in (1, 3) or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}: contiguous uint8 [H, W, 3] or flat")
    shape = (header.height, header.width, 3)
    if out.ndim == 3:
        return out if out.shape == shape else None
    size = header.height * header.width * 3
    return out[:size].reshape(shape) if out.size >= size else None


def decode_pillow(data: bytes, header: ImageHeader) -> Pixels:
    """RGB pixels as they are stored, not upright. Raises DataError when Pillow refuses too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Only the format that the header check has seen: no other parser gets the bytes.
            formats = ["JPEG"] if header.kind == "jpg" else ["PNG"]
            picture = Image.open(io.BytesIO(data), formats=formats)
            picture.load()
            if picture.mode.startswith("I"):  # 16 bit grey: Pillow would clip, not scale
                grey = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(picture.convert("RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        IndexError,
        struct.error,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"image is not decodable: {reason}") from None


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view of [h, w, 3] with an EXIF orientation applied (TIFF 6.0, tag 274): [H, W, 3]."""
    if orientation in SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
