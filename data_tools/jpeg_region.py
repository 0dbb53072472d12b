"""A part of a JPEG through the TurboJPEG 3 API: rows below it are never looked at, and blocks
beside and above it are read but not transformed.

The library is the system's libturbojpeg where that is of version 3, else the one inside the wheel
`turbojpeg`; without either, callers decode whole images. Only functions that turbojpeg.h declares
are called (TURBOJPEG_3 symbols), and nothing relies on the layout of their state.

Legend: h, w height and width of a region, in scaled pixels of the stored (not upright) image.
"""

import ctypes
import importlib.metadata
from functools import cache
from typing import Any, NamedTuple

import numpy as np

# turbojpeg.h: enum TJINIT, enum TJPF and enum TJPARAM
_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _WIDTH, _HEIGHT = 0, 5, 6

_SYSTEM = ("libturbojpeg.so.0", "libturbojpeg.dylib")  # what the loader's own search may find

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class StoredBox(NamedTuple):
    """A rectangle of the image as it is stored, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Region(ctypes.Structure):  # tjregion
    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


class _Factor(ctypes.Structure):  # tjscalingfactor
    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


def decode_part(
    data: bytes,
    size: tuple[int, int],
    box: StoredBox,
    shrink: int = 1,
    out: Pixels | None = None,
) -> Pixels | None:
    """Pixels of a part of a JPEG: uint8 [h, w, 3]; None if there is no library or it objects.

    Args:
        size: height and width that the header announced, in stored pixels.
        box: in pixels of the shrunk image, inside it; `left` a multiple of the shrunk MCU width.
        shrink: 1, 2, 4 or 8: sides are divided by it, rounding up.
        out: flat memory, used when it is large enough.
    """
    library = _library()
    if library is None:
        return None
    handle = library.tj3Init(_DECOMPRESS)
    if not handle:
        return None
    try:
        length = box.height * box.width * 3
        memory = out[:length] if out is not None and len(out) >= length else None
        if memory is None:
            memory = np.empty(length, np.uint8)
        pixels = memory.reshape(box.height, box.width, 3)
        return pixels if _decode(library, handle, data, size, box, shrink, pixels) else None
    finally:
        library.tj3Destroy(handle)


def is_available() -> bool:
    """Whether a library is there that can decode a part."""
    return _library() is not None


def _decode(
    library: ctypes.CDLL,
    handle: int,
    data: bytes,
    size: tuple[int, int],
    box: StoredBox,
    shrink: int,
    pixels: Pixels,
) -> bool:
    """Fill `pixels`; False at the first refusal, recoverable damage included."""
    if library.tj3Set(handle, _STOP_ON_WARNING, 1) != 0:
        return False
    if library.tj3DecompressHeader(handle, data, len(data)) != 0:
        return False
    found = library.tj3Get(handle, _HEIGHT), library.tj3Get(handle, _WIDTH)
    if found != size:
        return False
    if shrink != 1 and library.tj3SetScalingFactor(handle, _Factor(1, shrink)) != 0:
        return False
    region = _Region(box.left, box.top, box.width, box.height)
    if library.tj3SetCroppingRegion(handle, region) != 0:
        return False
    out = pixels.ctypes.data
    return bool(library.tj3Decompress8(handle, data, len(data), out, 0, _RGB) == 0)


@cache
def _library() -> ctypes.CDLL | None:
    """The first libturbojpeg of version 3 that can be loaded."""
    for path in (*_SYSTEM, _inside_wheel()):
        try:
            if path:
                return _declare(ctypes.CDLL(path))
        except (OSError, AttributeError):  # AttributeError: version 2 lacks the functions
            continue
    return None


def _inside_wheel() -> str | None:
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name.startswith("libturbojpeg")), None)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    handle, number = ctypes.c_void_p, ctypes.c_int
    source = (ctypes.c_char_p, ctypes.c_size_t)
    library.tj3Init.argtypes, library.tj3Init.restype = (number,), handle
    library.tj3Destroy.argtypes, library.tj3Destroy.restype = (handle,), None
    library.tj3Set.argtypes = (handle, number, number)
    library.tj3Get.argtypes = (handle, number)
    library.tj3DecompressHeader.argtypes = (handle, *source)
    library.tj3SetScalingFactor.argtypes = (handle, _Factor)
    library.tj3SetCroppingRegion.argtypes = (handle, _Region)
    library.tj3Decompress8.argtypes = (handle, *source, ctypes.c_void_p, number, number)
    return library
