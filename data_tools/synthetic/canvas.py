"""The drawing board of a figure: colour, part and relief planes, anti-aliased by supersampling.

Coordinates are body heights: x to the right, y up from the ground; `Canvas` turns them to pixels.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from data_tools.synthetic.appearance import Cloth, Colour, Point3

PARTS: tuple[str, ...] = (
    "background",
    "hair",
    "face",
    "upper_clothes",
    "arms",
    "lower_clothes",
    "legs",
    "shoes",
    "bag",
)
HAIR, FACE, UPPER, ARMS, LOWER, LEGS, SHOES, BAG = range(1, len(PARTS))
SUPERSAMPLE = 3

Point = tuple[float, float]


class Layer(NamedTuple):
    """A painted figure, to be laid over a background.

    Attributes:
        pixels: float32 [H, W, 3] in 0..255, premultiplied with alpha.
        alpha: float32 [H, W, 1] in 0..1.
        parts: uint8 [H, W], indices into PARTS.
    """

    pixels: np.ndarray
    alpha: np.ndarray
    parts: np.ndarray


class Canvas:
    """Colour, part and relief planes that every shape is drawn into."""

    def __init__(self, size: tuple[int, int], scale: float, foot: Point) -> None:
        self.size, self.scale, self.foot = size, scale * SUPERSAMPLE, foot
        shape = (size[1] * SUPERSAMPLE, size[0] * SUPERSAMPLE)
        self._colour = Image.new("RGB", shape)
        self._parts, self._relief = Image.new("L", shape), Image.new("L", shape)
        planes = (self._colour, self._parts, self._relief)
        self._draw = [ImageDraw.Draw(plane) for plane in planes]
        self._patterns: dict[Cloth, Image.Image] = {}

    def polygon(
        self, points: list[Point], part: int, fill: Colour | Cloth, relief: int = 128
    ) -> None:
        """Fill a closed outline given in body heights."""
        x0, y0 = self.foot[0] * SUPERSAMPLE, self.foot[1] * SUPERSAMPLE
        outline = [(x0 + x * self.scale, y0 - y * self.scale) for x, y in points]
        colour = fill.colour if isinstance(fill, Cloth) else fill
        fills: tuple[Colour | int, ...] = (colour, part, relief)
        for draw, value in zip(self._draw, fills, strict=True):
            draw.polygon(outline, fill=value)
        if isinstance(fill, Cloth) and fill.pattern != "plain":
            self._print(outline, fill)

    def capsule(
        self,
        start: Point3 | Point,
        end: Point3 | Point,
        radii: tuple[float, float],
        part: int,
        fill: Colour | Cloth,
        relief: int = 128,
    ) -> None:
        """A limb with round ends and a radius at each end."""
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        points = []
        for centre, radius, first in (
            (start, radii[0], angle + math.pi / 2),
            (end, radii[1], angle - math.pi / 2),
        ):
            for step in range(9):
                turn = first + math.pi * step / 8
                points.append(
                    (centre[0] + radius * math.cos(turn), centre[1] + radius * math.sin(turn))
                )
        self.polygon(points, part, fill, relief)

    def ellipse(
        self, centre: Point, radii: Point, part: int, fill: Colour | Cloth, relief: int = 128
    ) -> None:
        """An upright ellipse."""
        turns = (2 * math.pi * step / 24 for step in range(24))
        points = [
            (centre[0] + radii[0] * math.cos(turn), centre[1] + radii[1] * math.sin(turn))
            for turn in turns
        ]
        self.polygon(points, part, fill, relief)

    def finish(self) -> Layer:
        """Downsample, and shade by the slope of the relief (light from the upper left)."""
        colour = np.asarray(self._colour.reduce(SUPERSAMPLE), np.float32)  # [H, W, 3]
        parts = np.asarray(self._parts)
        solid = self._parts.point([0] + [255] * 255).reduce(SUPERSAMPLE)
        alpha = np.asarray(solid, np.float32)[..., None] / 255  # [H, W, 1]
        soft = max(self.scale / SUPERSAMPLE * 0.011, 0.6)
        relief = self._relief.reduce(SUPERSAMPLE).filter(ImageFilter.GaussianBlur(soft))
        height = np.asarray(relief, np.float32)
        slope = np.zeros_like(height)
        slope[1:-1, 1:-1] = (height[1:-1, 2:] - height[1:-1, :-2]) * 0.7
        slope[1:-1, 1:-1] += (height[2:, 1:-1] - height[:-2, 1:-1]) * 0.7
        light = np.clip(1.02 + slope * (0.004 * soft), 0.62, 1.3)[..., None]
        pixels = np.minimum(colour * light, 255 * alpha)
        middle = SUPERSAMPLE // 2
        return Layer(pixels, alpha, parts[middle::SUPERSAMPLE, middle::SUPERSAMPLE])

    def _print(self, outline: list[Point], cloth: Cloth) -> None:
        width, height = self._colour.size
        left = max(int(min(x for x, _ in outline)), 0)
        top = max(int(min(y for _, y in outline)), 0)
        right = min(int(max(x for x, _ in outline)) + 1, width)
        bottom = min(int(max(y for _, y in outline)) + 1, height)
        if right <= left or bottom <= top:
            return
        shape = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(shape).polygon([(x - left, y - top) for x, y in outline], fill=255)
        pattern = self._pattern(cloth).crop((left, top, right, bottom))
        mask = ImageChops.multiply(shape, pattern)
        self._colour.paste(cloth.second, (left, top, right, bottom), mask)

    def _pattern(self, cloth: Cloth) -> Image.Image:
        if cloth in self._patterns:
            return self._patterns[cloth]
        width, height = self._colour.size
        x = (np.arange(width) - self.foot[0] * SUPERSAMPLE) / self.scale / cloth.period
        y = (self.foot[1] * SUPERSAMPLE - np.arange(height)) / self.scale / cloth.period
        across, down = (x % 1 < 0.5)[None, :], (y % 1 < 0.5)[:, None]
        if cloth.pattern == "stripes":
            on = np.broadcast_to(down, (height, width))
        elif cloth.pattern == "bars":
            on = np.broadcast_to(across, (height, width))
        elif cloth.pattern == "checks":
            on = across ^ down
        elif cloth.pattern == "dots":
            on = ((x % 1 - 0.5) ** 2)[None, :] + ((y % 1 - 0.5) ** 2)[:, None] < 0.09
        else:  # halves: the upper part of the garment in the second colour
            on = np.broadcast_to((y * cloth.period > 0.72)[:, None], (height, width))
        image = Image.fromarray(on.astype(np.uint8) * 255)
        self._patterns[cloth] = image
        return image
