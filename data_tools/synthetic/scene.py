"""Pictures: a person as a detector would crop it, an empty background, a street with several.

Every picture is a pure function of its numbers: (seed, identity, index) or (seed, index).
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from data_tools.synthetic.appearance import appearance, generator, pose, skeleton
from data_tools.synthetic.backdrop import BACKDROPS, paint_backdrop
from data_tools.synthetic.camera import NUM_CAMERAS, develop
from data_tools.synthetic.canvas import Layer
from data_tools.synthetic.figure import paint_figure

PERSON_SIZE = (160, 80)
BACKGROUND_SIZE = (224, 288)


class Person(NamedTuple):
    """One crop: image uint8 [H, W, 3], parts uint8 [H, W] (indices into PARTS), and labels."""

    image: np.ndarray
    parts: np.ndarray
    identity: int
    camera: int


class Scene(NamedTuple):
    """Several persons in one picture.

    Attributes:
        image: uint8 [H, W, 3].
        boxes: int32 [P, 4], (top, left, height, width) of each person's visible pixels.
        identities: one for each box.
        parts: uint8 [H, W], indices into PARTS.
    """

    image: np.ndarray
    boxes: np.ndarray
    identities: tuple[int, ...]
    parts: np.ndarray


def draw_person(
    seed: int, identity: int, index: int, size: tuple[int, int] = PERSON_SIZE
) -> Person:
    """Picture `index` of `identity`: camera index % NUM_CAMERAS, own pose, place and clutter."""
    rng = generator(seed, "picture", identity, index)
    camera = index % NUM_CAMERAS
    looks, posed = appearance(seed, identity), pose(rng)
    image = paint_backdrop(rng, size, BACKDROPS[camera % len(BACKDROPS)]).astype(np.float32)
    if rng.random() < 0.3:
        _bystander(rng, seed, image)

    joints = skeleton(looks, posed)
    everything = [*joints.hand, *joints.toe, *joints.knee, *joints.elbow]
    xs = [x for x, _, _ in everything]
    reach = (max(xs) + min(xs)) / 2
    top = max(1.0, *(y + 0.03 for _, y, _ in joints.hand))
    height, width = size
    scale = height * float(rng.uniform(0.84, 1.04)) / top  # > 1: the box cuts head or feet off
    foot = (
        width * (0.5 + float(rng.normal(0, 0.045))) - reach * 0.7 * scale,
        (height + scale * top) / 2 + height * float(rng.normal(0, 0.025)),
    )
    layer = paint_figure(looks, posed, size, scale, foot)
    _ground_shadow(image, foot, scale)
    parts = layer.parts.copy()
    image = layer.pixels + image * (1 - layer.alpha)
    if rng.random() < 0.3:
        image = _occlude(rng, seed, image, parts)
    return Person(develop(rng, seed, camera, image), parts, identity, camera)


def draw_background(seed: int, index: int, size: tuple[int, int] = BACKGROUND_SIZE) -> np.ndarray:
    """An empty place: uint8 [H, W, 3]."""
    rng = generator(seed, "background", index)
    image = paint_backdrop(rng, size, BACKDROPS[index % len(BACKDROPS)]).astype(np.float32)
    return develop(rng, seed, index % NUM_CAMERAS, image)


def draw_scene(
    seed: int,
    index: int,
    *,
    num_persons: int = 4,
    size: tuple[int, int] = (256, 384),
    first_identity: int = 0,
) -> Scene:
    """`num_persons` identities from `first_identity` on, standing in one place, far ones behind."""
    rng = generator(seed, "scene", index)
    height, width = size
    image = paint_backdrop(rng, size, BACKDROPS[index % len(BACKDROPS)]).astype(np.float32)
    parts, owner = np.zeros(size, np.uint8), np.zeros(size, np.int16)
    near = np.sort(rng.uniform(0, 1, num_persons))
    places = (rng.permutation(num_persons) + rng.uniform(0.25, 0.75, num_persons)) / num_persons
    for number in range(num_persons):
        scale = height * (0.5 + 0.36 * float(near[number]))
        foot = (width * float(places[number]), height * (0.74 + 0.22 * float(near[number])))
        looks = appearance(seed, first_identity + number)
        layer = paint_figure(looks, pose(rng), size, scale, foot)
        _ground_shadow(image, foot, scale)
        image = layer.pixels + image * (1 - layer.alpha)
        on = layer.parts > 0
        parts[on], owner[on] = layer.parts[on], number + 1
    boxes, identities = [], []
    for number in range(num_persons):
        rows, columns = np.nonzero(owner == number + 1)
        if rows.size:
            top, left = int(rows.min()), int(columns.min())
            boxes.append((top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left))
            identities.append(first_identity + number)
    pixels = develop(rng, seed, index % NUM_CAMERAS, image)
    return Scene(pixels, np.array(boxes, np.int32).reshape(-1, 4), tuple(identities), parts)


def _bystander(rng: np.random.Generator, seed: int, image: np.ndarray) -> None:
    """Another person behind, half out of the picture."""
    height, width = image.shape[:2]
    scale = height * float(rng.uniform(0.6, 0.85))
    foot = (
        width * float(rng.choice((0.04, 0.96)) + rng.normal(0, 0.05)),
        height * float(rng.uniform(0.78, 0.92)),
    )
    layer = _somebody(rng, seed, (height, width), scale, foot)
    image[...] = layer.pixels + image * (1 - layer.alpha)


def _occlude(
    rng: np.random.Generator, seed: int, image: np.ndarray, parts: np.ndarray
) -> np.ndarray:
    """Something in front: a person at the edge, a post, a low wall, or a bush."""
    height, width = parts.shape
    kind = int(rng.integers(4))
    if kind == 0:
        scale = height * float(rng.uniform(1.0, 1.2))
        foot = (width * float(rng.choice((-0.02, 1.02))), height * 1.08)
        layer = _somebody(rng, seed, (height, width), scale, foot)
        alpha, pixels = layer.alpha, layer.pixels
    else:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
        if kind == 1:
            centre = float(rng.uniform(0.08, 0.42))
            inside = abs(x - centre) < float(rng.uniform(0.02, 0.04))
        elif kind == 2:
            inside = y > float(rng.uniform(0.72, 0.86))
        else:
            bumps = sum(np.sin(x * f + float(rng.uniform(0, 6))) for f in (11, 29, 67))
            inside = y + 0.025 * bumps > float(rng.uniform(0.74, 0.88))
        mask = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(0.5))
        alpha = np.asarray(mask, np.float32)[..., None] / 255
        base = (
            rng.uniform(50, 150) + rng.uniform(0, 45, 3)
            if kind < 3
            else rng.uniform((40, 70, 30), (80, 120, 60))
        )
        grain = 1 + 0.12 * rng.standard_normal((height // 2 + 1, width // 2 + 1))
        grain = np.repeat(np.repeat(grain, 2, 0), 2, 1)[:height, :width, None].astype(np.float32)
        shade = 1.05 - 0.25 * y[..., None]
        texture = grain if kind == 3 else 0.7 + 0.3 * grain
        pixels = base.astype(np.float32) * texture * shade * alpha
    parts[alpha[..., 0] > 0.5] = 0
    covered: np.ndarray = pixels + image * (1 - alpha)
    return covered


def _somebody(
    rng: np.random.Generator,
    seed: int,
    size: tuple[int, int],
    scale: float,
    foot: tuple[float, float],
) -> Layer:
    """A passer-by who is never one of the labelled identities."""
    stranger = appearance(seed, -1 - int(rng.integers(1 << 30)))
    return paint_figure(stranger, pose(rng), size, scale, foot)


def _ground_shadow(image: np.ndarray, foot: tuple[float, float], scale: float) -> None:
    height, width = image.shape[:2]
    top, bottom = max(int(foot[1] - 0.04 * scale), 0), min(int(foot[1] + 0.05 * scale), height)
    if bottom <= top:
        return
    y = (np.arange(top, bottom)[:, None] - foot[1]) / (0.028 * scale)
    x = (np.arange(width)[None, :] - foot[0]) / (0.17 * scale)
    dark = 0.45 * np.exp(-(x * x + y * y)).astype(np.float32)
    image[top:bottom] *= 1 - dark[..., None]
