"""The picture of SAIP's views: two base views, local crops and a scene to search in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dpal.saip.views import SaipPlan, render_saip
from dpal.visualize import Picture, mosaic
from jobs.preview_pictures import Drawn, centred

PERSON = 0.7  # share of the person where it is pasted


def draw_saip(
    plan: SaipPlan,
    keys: Sequence[str],
    images: Sequence[Picture],
    backgrounds: Sequence[Picture],
) -> Drawn:
    """What the student sees of each image in the first epoch, before colour noise."""
    sizes = [(one.shape[0], one.shape[1]) for one in backgrounds]
    rows: list[list[Picture]] = [[], [], [], []]
    for key, image in zip(keys, images, strict=True):
        spec = plan.spec(key, 0, (image.shape[0], image.shape[1]), sizes)
        pixels = render_saip(image, backgrounds, spec, plan)
        region = _resized(pixels.globals[0], plan.local_size)
        scene = pixels.background.astype(np.float32)
        for small, (top, left) in zip((pixels.locals[-1], region), pixels.corners, strict=True):
            part = scene[top : top + small.shape[0], left : left + small.shape[1]]
            part[...] = PERSON * small + (1 - PERSON) * part
        width = plan.size[1]
        views = (*pixels.globals, centred(np.concatenate(pixels.locals[:2]), plan.size))
        shrunk = _resized(scene.round().astype(np.uint8), (width, width))
        for row, picture in zip(rows, (*views, centred(shrunk, (width, width))), strict=True):
            row.append(picture)
    crops = f"{plan.local_crops} local crops and the first base view made small"
    return Drawn(
        "views",
        "Views of single persons and scenes",
        f"Each column is one image. Of every image the student sees two base views, {crops}, and a "
        "scene with two of them pasted in (70 % person), in which it has to find them. All views "
        "are fresh in every epoch.",
        mosaic(rows, row_labels=["base view 1", "base view 2", "local crops", "scene"]),
    )


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)
