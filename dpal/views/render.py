"""Pixels of a view, of a decoded image and a spec.

Legend: an image is uint8 RGB [H, W, 3].
"""

import numpy as np
from PIL import Image

from dpal.views.plan import ViewPlan
from dpal.views.specs import CompositeSpec, ViewSpec

PERSON_ALPHA = 0.7


def render(image: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
    """Pixels of a view: uint8 [size[0], size[1], 3]."""
    top, left, height, width = spec.box
    picture = Image.fromarray(image).resize(
        (size[1], size[0]),
        Image.Resampling.BICUBIC,
        box=(left, top, left + width, top + height),
    )
    pixels = np.asarray(picture)
    return pixels[:, ::-1] if spec.flip else pixels


def render_composite(
    image: np.ndarray,
    background: np.ndarray,
    spec: CompositeSpec,
    plan: ViewPlan,
    partner: np.ndarray | None = None,
) -> np.ndarray:
    """Pixels of a composite: uint8 [side, side, 3]; 0.7 person + 0.3 background.

    Args:
        partner: pixels of the image that `spec.partner` names.
    """
    assert (partner is None) == (spec.partner is None), spec
    canvas = render(background, spec.background_view, plan.composite_size).copy()
    height, width = plan.crop_size
    sources = (image, image if partner is None else partner)
    for source, person, (top, left) in zip(sources, spec.persons, spec.corners, strict=True):
        region = canvas[top : top + height, left : left + width]
        pixels = render(source, person, (height, width))
        mixed = PERSON_ALPHA * pixels + (1 - PERSON_ALPHA) * region
        region[...] = np.rint(mixed).astype(np.uint8)
    return canvas
