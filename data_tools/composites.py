"""Composites from specs: which images they need, and where those come from.

The cache worker and the loader both draw with this, so a teacher and its student are shown the
same pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from data_tools.backgrounds import BackgroundPool
from dpal.base.errors import DataError
from dpal.record import Spec
from dpal.views.boxes import boxes_in_view
from dpal.views.plan import ViewPlan
from dpal.views.render import render, render_composite
from dpal.views.specs import CompositeSpec, Partner, SceneSpec

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Neighbours(NamedTuple):
    """A sample's place among the other samples of its shard.

    Attributes:
        row: of the sample itself.
        total: samples of the shard.
        read: key and decoded image of any row.
    """

    row: int
    total: int
    read: Callable[[int], tuple[str, Pixels]]


class Pair(NamedTuple):
    """A composite of two persons, before it is rendered.

    Attributes:
        spec: how it is put together.
        partner: pixels of the image that `spec.partner` names; None: both are of the same image.
    """

    spec: CompositeSpec
    partner: Pixels | None


class DrawnComposite(NamedTuple):
    """A composite and how it was put together."""

    spec: Spec
    pixels: Pixels


class Composer:
    """Draws the composites of a recipe.

    Args:
        plan: decides them.
        pool: backgrounds or scenes, as `plan.views.composite` asks for.
    """

    def __init__(self, plan: ViewPlan, pool: BackgroundPool) -> None:
        self.plan, self.pool = plan, pool

    def draw(
        self,
        key: str,
        index: int,
        image: Pixels,
        neighbours: Neighbours | None,
        stored: Spec | None = None,
    ) -> DrawnComposite:
        """Composite `index` of a sample.

        Args:
            neighbours: of the sample; None is enough unless composites are of two images.
            stored: its spec where a target cache has one; None asks the plan.

        Raises:
            DataError: a shard of a single image has no second person, or a spec of a cache does
                not fit these images.
        """
        if self.plan.views.composite == "scenes":
            return self._scene(key, index, stored)
        spec, partner = self.pair(key, index, image.shape[:2], neighbours, stored)
        background = self.pool.images[spec.background]
        return DrawnComposite(spec, render_composite(image, background, spec, self.plan, partner))

    def pair(
        self,
        key: str,
        index: int,
        size: tuple[int, int],
        neighbours: Neighbours | None,
        stored: Spec | None = None,
    ) -> Pair:
        """Composite `index` of a sample, where composites show two persons.

        Args:
            size: height and width of the sample's image.
            neighbours, stored: as in `draw`.

        Raises:
            DataError: as in `draw`.
        """
        partner = pixels = None
        if self.plan.views.composite == "two":
            assert neighbours is not None, "composites of two images need the shard"
            row = self._partner_row(key, index, neighbours, stored)
            other, pixels = neighbours.read(row)
            partner = Partner(row, other, pixels.shape[:2])
        spec = stored
        if spec is None:
            spec = self.plan.composite(key, index, size, self.pool.sizes, partner)
        assert isinstance(spec, CompositeSpec), spec
        return Pair(spec, pixels)

    def boxes(self, spec: Spec) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Persons in a composite that shows a scene: left, top, right, bottom [M, 4], in pixels."""
        if not isinstance(spec, SceneSpec) or self.pool.scenes is None:
            raise DataError(f"composite {spec} is no scene, so it has no boxes")
        boxes = self.pool.scenes.boxes[spec.scene]
        return boxes_in_view(boxes, spec.view, self.plan.composite_size)

    def _partner_row(
        self, key: str, index: int, neighbours: Neighbours, stored: Spec | None
    ) -> int:
        if neighbours.total < 2:
            raise DataError(
                f"sample {key!r} is alone in its shard, so views.composite=two finds no second "
                "image for it; accepted is a data.samples_per_shard that leaves no shard with one"
            )
        if isinstance(stored, CompositeSpec) and stored.partner is not None:
            return stored.partner
        return self.plan.partner(key, index, neighbours.row, neighbours.total)

    def _scene(self, key: str, index: int, stored: Spec | None) -> DrawnComposite:
        scenes = self.pool.scenes
        assert scenes is not None, "the pool was loaded for another recipe"
        spec = stored if stored is not None else self.plan.scene(key, index, scenes.sizes)
        assert isinstance(spec, SceneSpec), spec
        image = scenes.image(spec.scene)
        return DrawnComposite(spec, render(image, spec.view, self.plan.composite_size))
