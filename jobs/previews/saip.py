"""The pictures of SAIP's views: two base views, local crops and a scene to search in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dpal.saip.views import SaipPixels, SaipPlan, render_saip
from dpal.views.render import PERSON_ALPHA
from dpal.visualize import Picture, mosaic
from jobs.previews.of_views import centred
from jobs.previews.sample import Drawn


def draw_saip(
    plan: SaipPlan,
    keys: Sequence[str],
    images: Sequence[Picture],
    backgrounds: Sequence[Picture],
) -> list[Drawn]:
    """What the student sees of each image in the first epoch, before colour noise."""
    sizes = [(one.shape[0], one.shape[1]) for one in backgrounds]
    rows: tuple[list[Picture], ...] = ([], [], [])
    scenes = []
    for key, image in zip(keys, images, strict=True):
        spec = plan.spec(key, 0, (image.shape[0], image.shape[1]), sizes)
        pixels = render_saip(image, backgrounds, spec, plan)
        crops = centred(np.concatenate(pixels.locals[:2]), plan.size)
        for row, picture in zip(rows, (*pixels.globals, crops), strict=True):
            row.append(picture)
        scenes.append(_scene(pixels, plan))
    middle = (len(scenes) + 1) // 2
    return [
        Drawn(
            "views",
            "Views of single persons",
            "Each column is one image. The student sees two base views of it, "
            f"{plan.local_crops} local crops, and the first base view made small, all fresh in "
            "every epoch and under colour noise.",
            mosaic(rows, row_labels=["base view 1", "base view 2", "local crops"]),
        ),
        Drawn(
            "composites",
            "Scenes to search in",
            "A local crop and the whole small image, blended (70 % person) over a background. The "
            "student has to find both.",
            mosaic([row for row in (scenes[:middle], scenes[middle:]) if row]),
        ),
    ]


def _scene(pixels: SaipPixels, plan: SaipPlan) -> Picture:
    """The background with the last local crop and the region image pasted in."""
    scene = pixels.background.astype(np.float32)
    pasted = (pixels.locals[-1], _resized(pixels.globals[0], plan.local_size))
    for small, (top, left) in zip(pasted, pixels.corners, strict=True):
        part = scene[top : top + small.shape[0], left : left + small.shape[1]]
        part[...] = PERSON_ALPHA * small + (1 - PERSON_ALPHA) * part
    return scene.round().astype(np.uint8)


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)
