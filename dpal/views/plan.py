"""The plan of all views: a pure function of (seed, sample key, view index).

A `ViewPlan` turns numbers into specs. It keeps no state and draws from no shared generator, so a
view is the same on every machine and in every order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpal.base.inputs import Views
from dpal.chance import generator
from dpal.views.draw import corners_apart, random_box, random_photometric
from dpal.views.specs import Box, CompositeSpec, Partner, Photometric, SceneSpec, ViewSpec

PLAN_VERSION = 1  # raise it whenever the same numbers would give other pixels
BACKGROUND_SCALE = (0.2, 1.0)
BACKGROUND_ASPECT = (3 / 4, 4 / 3)
SCENE_SCALE = (0.8, 1.0)  # of the reference's early version, which had real scenes
SCENE_ASPECT = (3 / 4, 4 / 3)
BLUR_PROBABILITY = {"base": 1.0, "composite": 0.1, "crop": 0.5}


@dataclass(frozen=True)
class ViewPlan:
    """All views of a data set, from the seeds and the `views` section of a recipe.

    Attributes:
        seed: decides the pinned views.
        views: sizes and ranges.
        repetition: `train.seed`; decides, with `seed`, what no teacher sees (crops, colour noise).
    """

    seed: int
    views: Views
    repetition: int = 0

    def describe(self) -> dict[str, object]:
        """What the cache digest must cover: everything that decides the pinned views' pixels."""
        free = {"crops", "crop_scale", "photometric"}  # never seen by a teacher as such ...
        if self.views.composites and self.views.composite != "scenes":
            free -= {"crop_scale"}  # ... but a composite holds one local crop
        if self.views.photometric == "pinned":
            free -= {"photometric"}
        if self.views.composite == "same":
            free |= {"composite"}  # as before there was a choice, so older caches stay valid
        return {
            "version": PLAN_VERSION,
            "seed": self.seed,
            **self.views.model_dump(mode="json", exclude=free),
        }

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the base view."""
        return self.views.height, self.views.width

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of a local crop (128 x 96 for a 256 x 128 view)."""
        return self.views.height // 2, self.views.width * 3 // 4

    @property
    def composite_size(self) -> tuple[int, int]:
        """Height and width of the composite, a square as high as the base view."""
        return self.views.height, self.views.height

    def view_index(self, key: str, epoch: int) -> int:
        """Which of the K base views this epoch shows: a fresh permutation every K epochs."""
        return self._cycle(key, "view-order", epoch, self.views.count)

    def composite_index(self, key: str, epoch: int) -> int:
        """Which of the K' composites this epoch shows."""
        return self._cycle(key, "composite-order", epoch, self.views.composites)

    def base(self, key: str, index: int, source: tuple[int, int]) -> ViewSpec:
        """Pinned base view `index`: views 2g and 2g + 1 are geometry g, plain and flipped."""
        rng = self._rng(key, "base", index // 2)
        box = random_box(rng, Box(0, 0, *source), self.views.scale, self.views.aspect)
        return ViewSpec(box, flip=bool(index % 2))

    def crops(self, key: str, index: int, epoch: int, source: tuple[int, int]) -> list[ViewSpec]:
        """Fresh local crops of `epoch`, each inside base view `index`."""
        inside = self.base(key, index, source).box
        rng = self._fresh(key, "crops", index, epoch)
        return [self._crop(rng, inside) for _ in range(self.views.crops)]

    def partner(self, key: str, index: int, row: int, count: int) -> int:
        """Row of the other image in composite `index` of row `row`, among `count` > 1 rows."""
        other = int(self._rng(key, "partner", index).integers(count - 1))
        return other + (other >= row)

    def composite(
        self,
        key: str,
        index: int,
        source: tuple[int, int],
        backgrounds: Sequence[tuple[int, int]],
        partner: Partner | None = None,
    ) -> CompositeSpec:
        """Pinned composite `index` (method: 3.1, both persons come from the same image).

        Args:
            source: height and width of the person image.
            backgrounds: height and width of every image in the background pool.
            partner: the image of the second person, if it is another one (see `partner`).
        """
        rng = self._rng(key, "composite", index)
        background = int(rng.integers(len(backgrounds)))
        whole = Box(0, 0, *backgrounds[background])
        behind = random_box(rng, whole, BACKGROUND_SCALE, BACKGROUND_ASPECT)
        base = self.base(key, index % self.views.count, source)
        crop = self._crop(rng, base.box)
        second, row = base, None
        if partner is not None:
            second, row = (
                self.base(partner.key, index % self.views.count, partner.size),
                partner.row,
            )
        corners = corners_apart(rng, self.views.height, self.crop_size)
        return CompositeSpec(
            background=background,
            background_view=ViewSpec(behind, flip=bool(rng.random() < 0.5)),
            persons=(crop, second),
            corners=corners,
            partner=row,
        )

    def scene(self, key: str, index: int, scenes: Sequence[tuple[int, int]]) -> SceneSpec:
        """Pinned composite `index` as a crop of a real scene (method: 3.1, early version).

        Args:
            scenes: height and width of every image in the scene pool.
        """
        rng = self._rng(key, "scene", index)
        scene = int(rng.integers(len(scenes)))
        box = random_box(rng, Box(0, 0, *scenes[scene]), SCENE_SCALE, SCENE_ASPECT)
        return SceneSpec(scene, ViewSpec(box, flip=bool(rng.random() < 0.5)))

    def photometric(self, key: str, epoch: int, view: int, blur_probability: float) -> Photometric:
        """Colour noise of view number `view` in `epoch`, that no teacher sees."""
        return random_photometric(self._fresh(key, "photometric", view, epoch), blur_probability)

    def pinned_photometric(
        self, key: str, kind: Literal["base", "composite"], index: int
    ) -> Photometric:
        """Colour noise of pinned view `index` of a kind, that student and teacher both see."""
        return random_photometric(
            self._rng(key, f"photometric-{kind}", index), BLUR_PROBABILITY[kind]
        )

    def _crop(self, rng: np.random.Generator, inside: Box) -> ViewSpec:
        box = random_box(rng, inside, self.views.crop_scale, self.views.aspect)
        return ViewSpec(box, flip=bool(rng.random() < 0.5))

    def _cycle(self, key: str, purpose: str, epoch: int, count: int) -> int:
        if count == 1:
            return 0
        order = self._rng(key, purpose, epoch // count).permutation(count)
        return int(order[epoch % count])

    def _rng(self, key: str, purpose: str, *numbers: int) -> np.random.Generator:
        return generator(self.seed, purpose, key, *numbers)

    def _fresh(self, key: str, purpose: str, *numbers: int) -> np.random.Generator:
        """Of what no teacher sees, so that it may differ between repetitions."""
        return generator(self.seed + self.repetition, purpose, key, *numbers)
