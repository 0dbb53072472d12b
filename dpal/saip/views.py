"""The views of SAIP: two base views, local crops, and a scene to search, fresh in every epoch.

Everything is a pure function of (seed, key, epoch) and held as explicit numbers. The region image
is the first base view made small; like the pasting of the scene it is made from noisy pixels on
the training device, so it needs no numbers here but its place.

Source: reference `main_pretrain.py` 355-463 (method: teachers and baselines, 1.3).
Legend: V = 3 + C noisy views in the order g1, g2, C local crops, background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpal.base.inputs import Views
from dpal.base.students import PATCH
from dpal.chance import generator
from dpal.views.draw import corners_apart, random_box
from dpal.views.plan import BACKGROUND_ASPECT, BACKGROUND_SCALE, ViewPlan
from dpal.views.render import render
from dpal.views.specs import Box, ViewSpec

RESCALINGS = (0.75, 0.875, 1.125, 1.25)  # of the last two small images
ENLARGEMENT = 1.25  # of the view that is reconstructed
NOISE_COLUMNS = 7  # `Photometric` and whether the view is solarised
_BLUR = {"g1": 1.0, "g2": 0.1, "local": 0.5, "background": 0.1}
_SOLARISE = {"g1": 0.0, "g2": 0.2, "local": 0.0, "background": 0.2}


class SaipSpec(NamedTuple):
    """Geometry of one sample.

    Attributes:
        globals: base views g1 and g2.
        locals: C local crops of the whole image; the last one is pasted into the scene.
        background: index into the background pool.
        background_view: box of the background that fills the square scene.
        corners: (top, left) in the scene of the last local crop and of the region image.
    """

    globals: tuple[ViewSpec, ViewSpec]
    locals: tuple[ViewSpec, ...]
    background: int
    background_view: ViewSpec
    corners: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class SaipPlan:
    """All views of SAIP.

    Attributes:
        seed: the recipe's seed plus that of the repetition; no view is pinned.
        views: sizes and ranges (`count`, `composites` and `crops` play no part).
        local_crops: C.
    """

    seed: int
    views: Views
    local_crops: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a base view."""
        return self.views.height, self.views.width

    @property
    def local_size(self) -> tuple[int, int]:
        """Height and width of a small image: half of a base view's."""
        return self.views.height // 2, self.views.width // 2

    @property
    def scene_size(self) -> tuple[int, int]:
        """Height and width of the scene: a square as high as a base view.

        The reference takes 224 beside 256 x 128; the base height fits every input size.
        """
        return self.views.height, self.views.height

    def spec(
        self,
        key: str,
        epoch: int,
        source: tuple[int, int],
        backgrounds: Sequence[tuple[int, int]],
    ) -> SaipSpec:
        """Geometry of a sample in `epoch`.

        Args:
            source: height and width of the person image.
            backgrounds: height and width of every image in the background pool.
        """
        rng, whole = generator(self.seed, "saip-views", key, epoch), Box(0, 0, *source)
        base, small = self.views.scale, self.views.crop_scale
        first, second = (self._view(rng, whole, base, self.views.aspect) for _ in range(2))
        crops = [self._view(rng, whole, small, self.views.aspect) for _ in range(self.local_crops)]
        background = int(rng.integers(len(backgrounds)))
        behind = Box(0, 0, *backgrounds[background])
        return SaipSpec(
            globals=(first, second),
            locals=tuple(crops),
            background=background,
            background_view=self._view(rng, behind, BACKGROUND_SCALE, BACKGROUND_ASPECT),
            corners=corners_apart(rng, self.views.height, self.local_size),
        )

    def noise(self, key: str, epoch: int) -> np.ndarray:
        """Colour noise of every view, float32 [V, 7]; the last column says whether to solarise."""
        plan = ViewPlan(self.seed, self.views)
        kinds = ("g1", "g2", *("local" for _ in range(self.local_crops)), "background")
        rows = np.empty((len(kinds), NOISE_COLUMNS), dtype=np.float32)
        chance = generator(self.seed, "saip-solarise", key, epoch).random(len(kinds))
        for view, kind in enumerate(kinds):
            rows[view, :-1] = plan.photometric(key, epoch, view, _BLUR[kind])
            rows[view, -1] = chance[view] < _SOLARISE[kind]
        return rows

    @staticmethod
    def _view(
        rng: np.random.Generator,
        inside: Box,
        scale: tuple[float, float],
        aspect: tuple[float, float],
    ) -> ViewSpec:
        return ViewSpec(random_box(rng, inside, scale, aspect), flip=bool(rng.random() < 0.5))


class SaipPixels(NamedTuple):
    """Clean pixels and numbers of one sample, uint8 unless said otherwise.

    Attributes:
        globals: [2, H, W, 3].
        locals: [C, h, w, 3].
        background: [S, S, 3].
        corners: int64 [2, 2], see `SaipSpec`.
    """

    globals: np.ndarray
    locals: np.ndarray
    background: np.ndarray
    corners: np.ndarray


def render_saip(
    image: np.ndarray, backgrounds: Sequence[np.ndarray], spec: SaipSpec, plan: SaipPlan
) -> SaipPixels:
    """Pixels of a sample; the scene is pasted later, from noisy pixels."""
    behind = backgrounds[spec.background]
    return SaipPixels(
        globals=np.stack([render(image, view, plan.size) for view in spec.globals]),
        locals=np.stack([render(image, view, plan.local_size) for view in spec.locals]),
        background=render(behind, spec.background_view, plan.scene_size),
        corners=np.array(spec.corners, dtype=np.int64),
    )


def rescaled_sizes(seed: int, step: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of the last two small images in `step`; one draw each, the same for every sample.

    Sizes are rounded (half up) to whole patches, where the reference leaves a rest uncovered.
    """
    factors = generator(seed, "saip-rescale", "", step).choice(RESCALINGS, size=2)
    return [scaled_size(size, float(factor)) for factor in factors]


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width times `factor`, as whole patches of 16 pixels, at least one."""
    height, width = (max(1, int(side * factor / PATCH + 0.5)) * PATCH for side in size)
    return height, width
