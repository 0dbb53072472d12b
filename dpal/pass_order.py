"""Which axis Pillow resizes first: it rounds in between, so the order shows in the pixels.

Versions differ, and the loader and the teacher's cache use whichever is installed. What it does is
found by asking it, not by its version, so that an unknown one is refused instead of trusted.
"""

import numpy as np
import PIL
import torch

from dpal.base.errors import ConfigError
from dpal.batch import Pictures
from dpal.resample import PassOrder, render_boxes, upload
from dpal.views.render import render
from dpal.views.specs import Box, ViewSpec

_ASKED = (8, 8)
# Heights and widths of pictures, two of them at least for every condition below.
_TELLING = (
    (30, 12),
    (12, 30),
    (16, 16),
    (24, 16),
    (25, 16),
    (9, 2),
    (7, 2),
    (1010, 10),
    (1000, 10),
)


def _lower(sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow 13 (its pull request 9549): the height loses more than twice what the width loses."""
    lost = sizes - np.array(size)
    found: np.ndarray = (lost[:, 0] > 0) & (lost[:, 0] > 2 * lost[:, 1])
    return found


def _slender(sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow 12.2 and 12.3 (its pull request 9524)."""
    found: np.ndarray = (sizes[:, 0] > 100 * sizes[:, 1]) & (size[0] < sizes[:, 0])
    return found


def _never(sizes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow before that."""
    return np.zeros(len(sizes), dtype=bool)


def pass_order() -> PassOrder:
    """The order of passes of the installed Pillow, found by asking it for a few pictures.

    Raises:
        ConfigError: it gives pixels that none of the known orders explains.
    """
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in _TELLING]
    for order in (_lower, _slender, _never):
        if all(_agrees(image, order) for image in images):
            return order
    raise ConfigError(
        f"train.render=device: Pillow {PIL.__version__} does not resize as any version that it "
        "restates; accepted with this Pillow is train.render=loader"
    )


def _agrees(image: np.ndarray, order: PassOrder) -> bool:
    size, box = _ASKED, Box(0, 0, *image.shape[:2])
    pictures = Pictures(image.reshape(-1, 3), np.array([image.shape[:2]]))
    numbers = np.array([[0, *box, 0]])
    drawn = render_boxes(upload(pictures, torch.device("cpu")), numbers, size, order)
    return np.array_equal(drawn[0].numpy(), render(image, ViewSpec(box, flip=False), size))
