"""Views: which pixels a model sees, as a pure function of (seed, sample key, view index).

A `ViewPlan` turns numbers into specs, a spec holds explicit pixel boxes, and `render` turns a
decoded image and a spec into pixels. Nothing here keeps state or draws from a shared generator.

Legend: an image is uint8 RGB [H, W, 3]; m boxes of persons in an image, M of them in its crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from dpal.base.inputs import Views
from dpal.chance import generator

PLAN_VERSION = 1  # raise it whenever the same numbers would give other pixels


class Box(NamedTuple):
    """A rectangle in source pixels; all four fit into uint16."""

    top: int
    left: int
    height: int
    width: int


class ViewSpec(NamedTuple):
    """A box of the source image, resized (bicubic, antialiased) and perhaps flipped."""

    box: Box
    flip: bool


@dataclass(frozen=True)
class CompositeSpec:
    """Two persons, alpha-blended side by side over a background.

    Attributes:
        background: index into the background pool.
        background_view: box of the background image that fills the square composite.
        persons: views of the two persons: a local crop of the image, and a base view of the same
            image or of its partner.
        corners: (top, left) of each person in composite pixels.
        partner: row in the shard of the image that shows the second person; None: the same image.
    """

    background: int
    background_view: ViewSpec
    persons: tuple[ViewSpec, ViewSpec]
    corners: tuple[tuple[int, int], tuple[int, int]]
    partner: int | None = None


class SceneSpec(NamedTuple):
    """A composite that is a crop of a real image of several persons.

    Attributes:
        scene: index into the scene pool.
        view: box of the scene that fills the square composite.
    """

    scene: int
    view: ViewSpec


class Partner(NamedTuple):
    """The image that shows a composite's second person.

    Attributes:
        row: its row in the shard.
        key: its sample key.
        size: its height and width.
    """

    row: int
    key: str
    size: tuple[int, int]


class Photometric(NamedTuple):
    """Colour noise of one view; factors multiply, 0 sigma means no blur."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: bool
    blur_sigma: float


PERSON_ALPHA = 0.7
BACKGROUND_SCALE = (0.2, 1.0)
BACKGROUND_ASPECT = (3 / 4, 4 / 3)
SCENE_SCALE = (0.8, 1.0)  # of the reference's early version, which had real scenes
SCENE_ASPECT = (3 / 4, 4 / 3)
MIN_BOX_LEFT = 0.3  # a box that lost more of its area to the crop is no instance of it
MAX_INSTANCES = 32  # the largest of a scene; bounds what the relation of a crowd costs
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
        return _photometric(self._fresh(key, "photometric", view, epoch), blur_probability)

    def pinned_photometric(
        self, key: str, kind: Literal["base", "composite"], index: int
    ) -> Photometric:
        """Colour noise of pinned view `index` of a kind, that student and teacher both see."""
        return _photometric(self._rng(key, f"photometric-{kind}", index), BLUR_PROBABILITY[kind])

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


def boxes_in_view(boxes: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
    """Boxes of persons as they lie in a view: float32 [M, 4], the largest first.

    A box is cut at the view's edges; one that has less than 30 % of its area left is dropped, and
    so are all but the 32 largest.

    Args:
        boxes: left, top, right, bottom in source pixels, float [m, 4].
        size: height and width of the view.
    """
    top, left, height, width = spec.box
    scale = np.array([size[1] / width, size[0] / height] * 2)
    whole = (boxes - np.array([left, top] * 2)) * scale  # [m, 4] in pixels of the view
    if spec.flip:
        whole = whole[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size[1], 0, size[1], 0]
    cut = np.clip(whole, 0, [size[1], size[0]] * 2)
    left_over = _areas(cut)
    kept = np.flatnonzero((left_over > 0) & (left_over >= MIN_BOX_LEFT * _areas(whole)))
    largest = kept[np.argsort(-left_over[kept], kind="stable")][:MAX_INSTANCES]
    shown: np.ndarray = cut[largest].astype(np.float32)
    return shown


def _areas(boxes: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _photometric(rng: np.random.Generator, blur_probability: float) -> Photometric:
    """Colour noise (method: 3.2): jitter .4/.4/.2/.1 p .8, grey p .2, blur of sigma .1-2."""
    jitter = rng.random() < 0.8
    low_high = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    drawn = [rng.uniform(low, high) for low, high in low_high]
    brightness, contrast, saturation, hue = drawn if jitter else (1.0, 1.0, 1.0, 0.0)
    grey = bool(rng.random() < 0.2)
    sigma, blurred = rng.uniform(0.1, 2.0), rng.random() < blur_probability
    return Photometric(
        brightness, contrast, saturation, hue, grey, float(sigma) if blurred else 0.0
    )


def corners_apart(
    rng: np.random.Generator, side: int, size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left) of two pictures of `size` in a square, the second right of the first."""
    height, width = size
    top_a, top_b = (int(rng.integers(side - height - 1)) for _ in range(2))
    left_a = int(rng.integers(side - 2 * width - 1))
    left_b = int(rng.integers(left_a + width, side - width - 1))
    return (top_a, left_a), (top_b, left_b)


def random_box(
    rng: np.random.Generator,
    inside: Box,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """A random box of the given area share and width / height; ten tries, then the widest fit."""
    area = inside.height * inside.width
    for _ in range(10):
        ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
        target = area * rng.uniform(*scale)
        width, height = round(float(np.sqrt(target * ratio))), round(float(np.sqrt(target / ratio)))
        if 0 < width <= inside.width and 0 < height <= inside.height:
            top = inside.top + int(rng.integers(inside.height - height + 1))
            left = inside.left + int(rng.integers(inside.width - width + 1))
            return Box(top, left, height, width)
    ratio = min(max(inside.width / inside.height, aspect[0]), aspect[1])
    height = min(inside.height, round(inside.width / ratio))
    width = min(inside.width, round(inside.height * ratio))
    return Box(
        inside.top + (inside.height - height) // 2,
        inside.left + (inside.width - width) // 2,
        max(height, 1),
        max(width, 1),
    )
