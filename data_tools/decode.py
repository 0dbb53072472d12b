"""Image bytes to RGB pixels: sizes come from the header, before anything is decoded.

simplejpeg decodes JPEG; what it refuses (recoverable damage) and PNG go to Pillow.
"""

import io
import struct
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from dpal.base.errors import DataError
from dpal.base.telemetry import DECODE_FALLBACK, Telemetry

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


class ImageHeader(NamedTuple):
    """What an image's header says.

    Attributes:
        kind: `jpg` or `png`, from the bytes, whatever the file is called.
        height: pixels, after EXIF orientation.
        width: pixels, after EXIF orientation.
        orientation: EXIF orientation, 1 to 8.
    """

    kind: Literal["jpg", "png"]
    height: int
    width: int
    orientation: int


def sniff(data: bytes) -> Literal["jpg", "png"] | None:
    """The image format by its first bytes; None if it is neither JPEG nor PNG."""
    if data.startswith(_JPEG):
        return "jpg"
    return "png" if data.startswith(_PNG) else None


def read_header(data: bytes) -> ImageHeader:
    """Format, size and orientation, without decoding. Raises DataError if there is no header."""
    kind = sniff(data)
    if kind is None:
        raise DataError("image is not decodable: it is neither JPEG nor PNG")
    try:
        if kind == "png":
            if data[12:16] != b"IHDR":
                raise ValueError("IHDR")
            width, height = struct.unpack(">II", data[16:24])
        else:
            height, width, _colours, _sampling = simplejpeg.decode_jpeg_header(data, strict=False)
        if not height or not width:
            raise ValueError("empty")
    except (ValueError, KeyError, struct.error):  # KeyError: an unknown colour space
        raise DataError("image is not decodable: its header is damaged") from None
    orientation = _orientation(data) if kind == "jpg" and b"Exif\0\0" in data[:4096] else 1
    if orientation in _SWAPPED:
        height, width = width, height
    return ImageHeader(kind, height, width, orientation)


def decode_rgb(data: bytes, max_pixels: int, *, telemetry: Telemetry | None = None) -> Pixels:
    """Upright RGB pixels of a JPEG or PNG: uint8 [H, W, 3].

    Raises:
        DataError: when it cannot be decoded, or has more than `max_pixels` by its header.
    """
    header = read_header(data)
    if header.height * header.width > max_pixels:
        raise DataError(
            f"image is too large: {header.width} x {header.height} pixels, "
            f"accepted are {max_pixels} (data.max_pixels)"
        )
    pixels = _decode_fast(data) if header.kind == "jpg" else None
    if pixels is None:
        if header.kind == "jpg" and telemetry is not None:
            telemetry.report(DECODE_FALLBACK, 1)
        pixels = _decode_pillow(data, header)
    return _upright(pixels, header.orientation)


def _decode_fast(data: bytes) -> Pixels | None:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except (ValueError, KeyError):
        return None
    return pixels


def _decode_pillow(data: bytes, header: ImageHeader) -> Pixels:
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


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is free text of any camera: damage there never costs an image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation (TIFF 6.0, tag 274) to [H, W, 3]."""
    if orientation in _SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
