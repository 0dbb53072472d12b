"""What an image's first bytes say, read before anything is decoded: format, size, orientation.

One walk over the markers (JPEG, ITU T.81 annex B) or a look at IHDR (PNG), so that bombs are
refused before a decoder allocates anything.
"""

import io
import re
import struct
from functools import lru_cache
from typing import Literal, NamedTuple

import simplejpeg
from PIL import Image

from dpal.base.errors import DataError

MAX_SCANS = 500  # encoders write about 10; every scan makes a decoder visit every block again
MAX_SCANNED_PIXELS = 2**31  # scans x pixels: some seconds of decoding
MAX_SEGMENTS = 2000  # before the frame header: cameras write up to some hundreds
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112
_SHORT = 3  # TIFF type of an orientation
_APP1, _SOS, _EOI = 0xE1, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers; the rest are tables
_BARE = frozenset(range(0xD0, 0xD9)) | {0x01}  # markers without a length
_SCAN_START = re.compile(b"\xff\xda")
_SEGMENT, _FRAME = struct.Struct(">BBH"), struct.Struct(">HBHHB")
# JFIF headers and tables of the usual lengths, skipped at once: quantisation tables for one or two
# components, and the Huffman tables of T.81 annex K, alone or together.
_COMMON = re.compile(
    rb"(?:\xff\xe0\0\x10.{14}|\xff\xdb\0\x43.{65}|\xff\xdb\0\x84.{130}"
    rb"|\xff\xc4\0\x1f.{29}|\xff\xc4\0\xb5.{179}|\xff\xc4\x01\xa2.{416})*",
    re.DOTALL,
)


class ImageHeader(NamedTuple):
    """What an image's header says.

    Attributes:
        kind: `jpg` or `png`, from the bytes, whatever the file is called.
        height: pixels, after EXIF orientation.
        width: pixels, after EXIF orientation.
        orientation: EXIF orientation, 1 to 8.
        mcu: height and width, in stored pixels, of the smallest coded unit of a JPEG of one scan
            with Huffman codes, 8 bits and 1 or 3 components; None for all else. Only such a
            file can be decoded in part.
    """

    kind: Literal["jpg", "png"]
    height: int
    width: int
    orientation: int
    mcu: tuple[int, int] | None = None


def sniff(data: bytes) -> Literal["jpg", "png"] | None:
    """The image format by its first bytes; None if it is neither JPEG nor PNG."""
    if data.startswith(_JPEG):
        return "jpg"
    return "png" if data.startswith(_PNG) else None


def read_header(data: bytes) -> ImageHeader:
    """Format, size and orientation, without decoding. Raises DataError if there is no header,
    or one that asks a decoder for far more work than its pixels are worth."""
    kind = sniff(data)
    if kind is None:
        raise DataError("image is not decodable: it is neither JPEG nor PNG")
    try:
        return _read_jpeg(data) if kind == "jpg" else _read_png(data)
    except (ValueError, KeyError, IndexError, struct.error):  # KeyError: an unknown colour space
        raise DataError("image is not decodable: its header is damaged") from None


def require_size(header: ImageHeader, max_pixels: int) -> None:
    """Raise DataError when the header announces more than `max_pixels`."""
    if header.height * header.width > max_pixels:
        raise DataError(
            f"image is too large: {header.width} x {header.height} pixels, "
            f"accepted are {max_pixels} (data.max_pixels)"
        )


def _read_png(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise ValueError("IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return ImageHeader("png", *_positive(height, width), 1)


def _read_jpeg(data: bytes) -> ImageHeader:
    """Walk from segment to segment to the first scan, and read the frame on the way."""
    exif = xmp = frame = -1
    position = 2
    for _segment in range(MAX_SEGMENTS):
        position = _end_of_common(data, position)
        mark, code, length = _SEGMENT.unpack_from(data, position)
        if mark != 0xFF:
            break
        if code == _SOS:
            return _read_frame(data, frame, data[position + 4], _orientation(data, exif, xmp))
        if code in _FRAMES:
            if frame >= 0:
                raise ValueError("two frames")
            frame = position
        elif code == 0xFF or code in _BARE:  # a fill byte, or a marker alone
            length = -1 if code == 0xFF else 0
        elif code == _APP1:
            if exif < 0 and data.startswith(_EXIF, position + 4):
                exif = position
            elif xmp < 0 and data.startswith(_XMP, position + 4):
                xmp = position
        elif code == _EOI:
            raise ValueError("no scan")
        position += 2 + length
    else:
        raise DataError(
            f"image is not decodable: more than {MAX_SEGMENTS} segments precede its first scan"
        )
    # Bytes between segments: libjpeg skips them, so it finds the size; orientation is given up.
    height, width, _colours, _sampling = simplejpeg.decode_jpeg_header(data, strict=False)
    header = ImageHeader("jpg", *_positive(height, width), 1)
    _require_few_scans(data, header)
    return header


def _end_of_common(data: bytes, position: int) -> int:
    found = _COMMON.match(data, position)
    return found.end() if found is not None else position


def _read_frame(data: bytes, position: int, in_scan: int, orientation: int) -> ImageHeader:
    """Size and coding from the frame header at `position` (-1: there is none).

    Args:
        in_scan: how many components the first scan holds.
    """
    if position < 0:
        raise ValueError("no frame")
    code = data[position + 1]
    length, bits, height, width, components = _FRAME.unpack_from(data, position + 2)
    if not 1 <= components <= 4 or length != 8 + 3 * components:
        raise DataError(
            f"image is not decodable: its header announces {components} colour components, "
            "accepted are 1 to 4"
        )
    if not height or not width:
        raise ValueError("empty")
    mcu = None
    if code in (0xC0, 0xC1) and bits == 8 and components in (1, 3) and in_scan == components:
        mcu = _mcu(data[position + 11 : position + 11 + 3 * components : 3])
    if orientation in SWAPPED:
        height, width = width, height
    header = ImageHeader("jpg", height, width, orientation, mcu)
    if mcu is None:
        _require_few_scans(data, header)
    return header


@lru_cache(maxsize=64)
def _mcu(factors: bytes) -> tuple[int, int]:
    """Height and width of a coded unit; a factor is horizontal << 4 | vertical."""
    return 8 * max(factor & 15 for factor in factors), 8 * max(factor >> 4 for factor in factors)


def _require_few_scans(data: bytes, header: ImageHeader) -> None:
    """Refuse a small file that would keep a decoder busy with scan after scan."""
    allowed = min(MAX_SCANS, max(MAX_SCANNED_PIXELS // (header.height * header.width), 16))
    # Entropy-coded bytes never hold a marker.
    for scans, _found in enumerate(_SCAN_START.finditer(data), 1):
        if scans > allowed:
            raise DataError(
                f"image is not decodable: it has more than {allowed} scans for "
                f"{header.width} x {header.height} pixels"
            )


def _positive(height: int, width: int) -> tuple[int, int]:
    if not height or not width:
        raise ValueError("empty")
    return height, width


def _orientation(data: bytes, exif: int, xmp: int) -> int:
    """EXIF orientation of a JPEG whose APP1 segments start at `exif` and `xmp` (-1: none)."""
    if exif < 0:
        return 1
    found = _tiff_orientation(data[exif + 10 : exif + 2 + (data[exif + 2] << 8) + data[exif + 3]])
    if found is None and xmp >= 0:
        found = _pillow_orientation(data)
    return found if found is not None and 1 <= found <= 8 else 1


def _tiff_orientation(tiff: bytes) -> int | None:
    """Tag 274 of the first directory (TIFF 6.0); None where there is none or it is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _ORIENTATION:
                if (kind, values) != (_SHORT, 1):
                    return None
                return int(struct.unpack_from(f"{order}H", tiff, entry + 8)[0])
    except struct.error:  # EXIF is free text of any camera: damage there never costs an image
        return None
    return None


def _pillow_orientation(data: bytes) -> int | None:
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
            value = picture.getexif().get(_ORIENTATION)
    except Exception:  # see above
        return None
    return value if isinstance(value, int) else None
