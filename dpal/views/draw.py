"""What is drawn from a generator: boxes, places of two persons, colour noise.

Every function draws from the generator that it is given, in a fixed order: another order would
give other views.
"""

import numpy as np

from dpal.views.specs import Box, Photometric


def random_box(
    rng: np.random.Generator,
    inside: Box,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """A random box of the given area share and width / height; ten tries, then the widest fit."""
    area = inside.height * inside.width
    for _ in range(10):
        ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
        target = area * rng.uniform(*scale)
        width, height = round(float(np.sqrt(target * ratio))), round(float(np.sqrt(target / ratio)))
        if 0 < width <= inside.width and 0 < height <= inside.height:
            top = inside.top + int(rng.integers(inside.height - height + 1))
            left = inside.left + int(rng.integers(inside.width - width + 1))
            return Box(top, left, height, width)
    ratio = min(max(inside.width / inside.height, aspect[0]), aspect[1])
    height = min(inside.height, round(inside.width / ratio))
    width = min(inside.width, round(inside.height * ratio))
    return Box(
        inside.top + (inside.height - height) // 2,
        inside.left + (inside.width - width) // 2,
        max(height, 1),
        max(width, 1),
    )


def corners_apart(
    rng: np.random.Generator, side: int, size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of two pictures of `size` in a square, the second right of the first."""
    height, width = size
    top_a, top_b = (int(rng.integers(side - height - 1)) for _ in range(2))
    left_a = int(rng.integers(side - 2 * width - 1))
    left_b = int(rng.integers(left_a + width, side - width - 1))
    return (top_a, left_a), (top_b, left_b)


def random_photometric(rng: np.random.Generator, blur_probability: float) -> Photometric:
    """Colour noise (method: 3.2): jitter .4/.4/.2/.1 p .8, grey p .2, blur of sigma .1-2."""
    jitter = rng.random() < 0.8
    low_high = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    drawn = [rng.uniform(low, high) for low, high in low_high]
    brightness, contrast, saturation, hue = drawn if jitter else (1.0, 1.0, 1.0, 0.0)
    grey = bool(rng.random() < 0.2)
    sigma, blurred = rng.uniform(0.1, 2.0), rng.random() < blur_probability
    return Photometric(
        brightness, contrast, saturation, hue, grey, float(sigma) if blurred else 0.0
    )
