"""Evaluation images squeezed to the view size, decoded once for many models if wanted.

Legend: n images of H x W.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.decode import decode_rgb
from dpal.base.errors import DataError

MAX_PIXELS = 64_000_000


def pictures(
    files: Sequence[Path], size: tuple[int, int], kept: Path | None = None
) -> Iterator[np.ndarray]:
    """Every image as uint8 [H, W, 3], in order.

    Args:
        size: H and W.
        kept: folder where the decoded images [n, H, W, 3] are kept for the next model; its size
            is n H W 3 bytes a set. None: nothing is kept.

    Raises:
        DataError: an image that cannot be decoded.
    """
    if kept is None:
        yield from (_squeezed(path, size) for path in files)
        return
    path = kept / f"{_identity(files, size)}.npy"
    if not path.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        decoded = np.lib.format.open_memmap(
            aside, mode="w+", dtype=np.uint8, shape=(len(files), *size, 3)
        )
        for index, file in enumerate(files):
            decoded[index] = _squeezed(file, size)
        decoded.flush()
        os.replace(aside, path)
    yield from np.load(path, mmap_mode="r")


def _identity(files: Sequence[Path], size: tuple[int, int]) -> str:
    """Digest of what the decoded images follow from; a file that was touched is decoded again."""
    digest = hashlib.sha256(repr(size).encode())
    for file in files:
        status = file.stat() if file.is_file() else None
        told = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(repr((str(file.resolve()), told)).encode())
    return digest.hexdigest()[:16]


def _squeezed(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        pixels = decode_rgb(path.read_bytes(), MAX_PIXELS)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    resized = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)
