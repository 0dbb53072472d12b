"""A few images of a run with their views, and what one picture of a preview is.

Legend: n images, H x W base view, S composite side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_tools.composites import Composer, Neighbours
from dpal.record import Spec
from dpal.views.plan import ViewPlan
from dpal.views.render import render
from dpal.visualize import Picture


class Drawn(NamedTuple):
    """A picture and what is said under it; fields as in `Preview`."""

    kind: str
    title: str
    caption: str
    picture: Picture


@dataclass(frozen=True)
class Sample:
    """A few images of the run, decoded, with their views.

    Attributes:
        keys: sample keys.
        images: decoded images, each uint8 [H_i, W_i, 3].
        bases: base view 0, uint8 [n, H, W, 3].
        composites: composite 0, uint8 [n, S, S, 3]; n = 0 for a run without composites.
        specs: how each composite was put together.
    """

    plan: ViewPlan
    keys: tuple[str, ...]
    images: tuple[Picture, ...]
    bases: np.ndarray
    composites: np.ndarray
    specs: tuple[Spec, ...]


def make_sample(
    plan: ViewPlan,
    keys: tuple[str, ...],
    images: tuple[Picture, ...],
    composer: Composer | None,
) -> Sample:
    """Render the first base view and the first composite of every image.

    Args:
        composer: None leaves composites out. Where they are of two images, these few are the
            shard that partners come from.
    """
    bases, drawn = [], []
    for row, (key, image) in enumerate(zip(keys, images, strict=True)):
        bases.append(render(image, plan.base(key, 0, image.shape[:2]), plan.size))
        if composer is not None:
            near = Neighbours(row, len(keys), lambda other: (keys[other], images[other]))
            drawn.append(composer.draw(key, 0, image, near))
    composites = np.stack([one.pixels for one in drawn]) if drawn else np.empty((0, 0, 0, 3), "u1")
    specs = tuple(one.spec for one in drawn)
    return Sample(plan, keys, images, np.stack(bases), composites, specs)
