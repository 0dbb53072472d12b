"""Cameras: each has its own colour cast, contrast, sharpness and noise."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from data_tools.synthetic.appearance import generator

NUM_CAMERAS = 4


class Camera(NamedTuple):
    """Fixed properties; `gain` multiplies RGB, `lift` is added, both on a 0..1 scale."""

    gain: tuple[float, float, float]
    lift: tuple[float, float, float]
    gamma: float
    saturation: float
    blur: float
    noise: float


def camera(seed: int, number: int) -> Camera:
    """The properties of camera `number`; neighbouring numbers differ strongly in colour."""
    rng = generator(seed, "camera", number)
    casts = ((1.1, 1.0, 0.88), (0.88, 0.98, 1.12), (0.95, 1.05, 0.9), (1.06, 0.95, 1.04))
    gain = np.asarray(casts[number % len(casts)]) * rng.uniform(0.97, 1.03, 3)
    lift = rng.uniform(-0.02, 0.04, 3)
    return Camera(
        gain=(float(gain[0]), float(gain[1]), float(gain[2])),
        lift=(float(lift[0]), float(lift[1]), float(lift[2])),
        gamma=float(rng.choice((0.85, 0.95, 1.05, 1.15))),
        saturation=float(rng.uniform(0.75, 1.1)),
        blur=float(rng.uniform(0.2, 0.8)),
        noise=float(rng.uniform(1.5, 4.0)),
    )


def develop(rng: np.random.Generator, seed: int, number: int, image: np.ndarray) -> np.ndarray:
    """What camera `number` makes of clean pixels float32 [H, W, 3] in 0..255: uint8 [H, W, 3]."""
    lens = camera(seed, number)
    height, width = image.shape[:2]
    exposure = float(np.exp(rng.normal(0, 0.12)))
    left, right = (1 + rng.uniform(-0.15, 0.15, 2)).tolist()
    sun = np.linspace(left, right, width, dtype=np.float32)[None, :, None]
    grey = image.mean(2, keepdims=True)
    saturation = lens.saturation * float(rng.uniform(0.8, 1.2))
    light = (grey + (image - grey) * saturation) * (sun * exposure / 255)
    cast = np.asarray(lens.gain) * np.exp(rng.normal(0, 0.03, 3))
    light = light * cast.astype(np.float32) + np.asarray(lens.lift, np.float32)
    light = np.clip(light, 0, 1) ** np.float32(lens.gamma)
    light += rng.standard_normal((height, width, 1), np.float32) * np.float32(lens.noise / 255)
    picture = Image.fromarray((np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8))
    blur = (lens.blur * float(rng.uniform(0.5, 1.5))) * height / 160
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)))
