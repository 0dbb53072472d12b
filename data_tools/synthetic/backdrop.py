"""Cluttered places behind the persons: street, park, hall, square."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_tools.synthetic.appearance import Colour, shaded

BACKDROPS = ("street", "park", "hall", "square")


def paint_backdrop(rng: np.random.Generator, size: tuple[int, int], kind: str) -> np.ndarray:
    """One random place of `kind` (see BACKDROPS): uint8 [H, W, 3]."""
    height, width = size
    horizon = int(height * rng.uniform(0.5, 0.78))
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    painter = {"street": _street, "park": _park, "hall": _hall, "square": _square}[kind]
    painter(rng, draw, size, horizon)
    for _ in range(int(rng.integers(0, 3))):
        _clutter(rng, draw, size, horizon)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.6, 1.8)) * height / 160))
    pixels = np.asarray(image, np.float32)
    grain = rng.normal(1, 0.04, (height // 8 + 2, width // 8 + 2)).astype(np.float32)
    soft = Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC)
    fall = np.linspace(rng.uniform(0.9, 1.15), rng.uniform(0.8, 1.1), height, dtype=np.float32)
    pixels = pixels * np.asarray(soft)[..., None] * fall[:, None, None]
    painted: np.ndarray = np.clip(pixels, 0, 255).astype(np.uint8)
    return painted


def _street(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int
) -> None:
    height, width = size
    _ground(rng, draw, size, horizon, _colour(rng, (88, 88, 92), 24))
    draw.rectangle((0, 0, width, horizon), fill=_colour(rng, (176, 196, 214), 22))
    left = -int(rng.integers(0, height // 4))
    while left < width:
        wide = int(height * rng.uniform(0.22, 0.5))
        top = int(horizon * rng.uniform(-0.1, 0.45))
        wall = _colour(rng, (148, 132, 118), 34)
        draw.rectangle((left, top, left + wide, horizon), fill=wall)
        glass = shaded(wall, 0.5) if rng.random() < 0.7 else _colour(rng, (208, 200, 160), 24)
        cell, gap = max(height // 14, 4), max(height // 30, 2)
        for y in range(top + gap * 2, horizon - cell, cell + gap * 2):
            for x in range(left + gap, left + wide - cell // 2, cell + gap):
                draw.rectangle((x, y, x + cell * 3 // 5, y + cell), fill=glass)
        left += wide
    curb = int(horizon + (height - horizon) * rng.uniform(0.1, 0.5))
    draw.line((0, curb, width, curb), fill=(196, 194, 186), width=max(height // 60, 1))


def _park(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int
) -> None:
    height, width = size
    _ground(rng, draw, size, horizon, _colour(rng, (104, 128, 72), 24))
    draw.rectangle((0, 0, width, horizon), fill=_colour(rng, (186, 204, 212), 20))
    for _ in range(int(rng.integers(1, 4))):
        x, wide = float(rng.uniform(0, width)), height * float(rng.uniform(0.012, 0.03))
        draw.rectangle((x - wide, horizon * 0.2, x + wide, horizon), fill=(84, 64, 48))
    count = 70 * width // height + 30
    centres = rng.uniform((0, -0.1 * height), (width, horizon), (count, 2))
    radii = height * rng.uniform(0.02, 0.08, count)
    greens = rng.uniform((38, 70, 30), (112, 152, 74), (count, 3)).astype(int)
    for (x, y), radius, green in zip(
        centres.tolist(), radii.tolist(), greens.tolist(), strict=True
    ):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(green))
    if rng.random() < 0.6:
        path = _colour(rng, (176, 160, 132), 18)
        x = float(rng.uniform(0.2, 0.8)) * width
        draw.polygon(
            (
                (x - 4, horizon),
                (x + 4, horizon),
                (x + width * 0.5, height),
                (x - width * 0.5, height),
            ),
            fill=path,
        )


def _hall(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int
) -> None:
    height, width = size
    wall = _colour(rng, (190, 184, 170), 34)
    floor = _colour(rng, (150, 138, 122), 34)
    draw.rectangle((0, 0, width, horizon), fill=wall)
    _ground(rng, draw, size, horizon, floor)
    centre = float(rng.uniform(0, width))
    for seam in range(-2 * width, 3 * width, max(height // 6, 6)):
        draw.line((centre + (seam - centre) * 0.3, horizon, seam, height), fill=shaded(floor, 0.8))
    row, step = float(horizon), height * 0.03
    while row < height:
        draw.line((0, row, width, row), fill=shaded(floor, 0.8))
        row, step = row + step, step * 1.35
    for _ in range(int(rng.integers(1, 4))):
        x, wide = float(rng.uniform(-0.2, 1)) * width, height * float(rng.uniform(0.1, 0.25))
        top = horizon * float(rng.uniform(0.05, 0.4))
        low = horizon * float(rng.choice((0.7, 1.0)))
        draw.rectangle((x, top, x + wide, low), fill=_colour(rng, (128, 124, 118), 45))
        frame = shaded(wall, 0.6)
        draw.rectangle((x, top, x + wide, low), outline=frame, width=max(height // 80, 1))
    draw.rectangle((0, horizon - height // 40, width, horizon), fill=shaded(wall, 0.7))


def _square(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int
) -> None:
    height, width = size
    draw.rectangle((0, 0, width, horizon), fill=_colour(rng, (206, 198, 190), 26))
    _ground(rng, draw, size, horizon, _colour(rng, (168, 156, 142), 26))
    arch = int(height * rng.uniform(0.16, 0.3))
    wall, hole = _colour(rng, (176, 150, 122), 30), _colour(rng, (78, 70, 70), 18)
    top = int(horizon * rng.uniform(0, 0.4))
    draw.rectangle((0, top, width, horizon), fill=wall)
    for x in range(-int(rng.integers(arch)), width, arch + max(arch // 4, 2)):
        low = top + (horizon - top) // 3
        draw.ellipse((x, low - arch // 2, x + arch, low + arch // 2), fill=hole)
        draw.rectangle((x, low, x + arch, horizon), fill=hole)
    for y in np.linspace(horizon, height, 7)[1:-1]:
        draw.line((0, float(y), width, float(y)), fill=(150, 140, 128))


def _clutter(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int
) -> None:
    """A post, a parked car, or a bin."""
    height, width = size
    x, kind = float(rng.uniform(0, width)), int(rng.integers(3))
    colour = _colour(rng, (110, 104, 104), 48)
    foot = horizon + height * float(rng.uniform(0, 0.12))
    if kind == 0:
        wide = height * 0.012
        draw.rectangle((x - wide, 0, x + wide, foot), fill=shaded(colour, 0.6))
    elif kind == 1:
        long, tall = height * 0.4, height * 0.13
        draw.rounded_rectangle(
            (x, foot - tall * 1.7, x + long * 0.7, foot), tall * 0.5, fill=(58, 66, 76)
        )
        draw.rounded_rectangle(
            (x - long * 0.2, foot - tall, x + long, foot), tall * 0.35, fill=colour
        )
        for wheel in (x, x + long * 0.75):
            radius = tall * 0.35
            draw.ellipse(
                (wheel - radius, foot - radius, wheel + radius, foot + radius), fill=(28, 28, 30)
            )
    else:
        wide, tall = height * 0.05, height * float(rng.uniform(0.1, 0.22))
        draw.rectangle((x - wide, foot - tall, x + wide, foot), fill=colour)


def _ground(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    horizon: int,
    colour: Colour,
) -> None:
    height, width = size
    far, near = rng.uniform(0.85, 1.1), rng.uniform(0.8, 1.15)
    for y in range(horizon, height):
        share = (y - horizon) / max(height - horizon, 1)
        draw.line((0, y, width, y), fill=shaded(colour, float(far + (near - far) * share)))


def _colour(rng: np.random.Generator, centre: Colour, spread: int) -> Colour:
    red, green, blue = (centre + rng.uniform(-spread, spread, 3)).clip(0, 255).astype(int).tolist()
    return red, green, blue
