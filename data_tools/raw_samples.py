"""Samples of the methods that align a student with teachers, rendered on the training device.

The loader only decodes, and says by numbers which boxes make up the views. Composites that are
crops of scenes come rendered: a scene is far larger than what is shown of it.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from data_tools.joined import JoinedRows, JoinedSamples
from data_tools.sample import Pixels, Sample
from dpal.batch import Pairs, Pictures, RawBatch
from dpal.record import Spec
from dpal.views.specs import ViewSpec


class RawSamples(JoinedSamples):
    """Decodes a `RawBatch` (a `data_tools.loader.SampleRenderer`); see `JoinedSamples`."""

    @cached_property
    def backgrounds(self) -> Pictures:
        """The pool: one object for all batches."""
        return _joined(self.composer.pool.images)

    def start(self, size: int) -> "_Collecting":
        """Begin a batch of `size` samples."""
        return _Collecting(self, size)


class _Collecting(JoinedRows):
    """Decoded images and numbers; an image's place in the batch is known when all are there."""

    def __init__(self, samples: RawSamples, size: int) -> None:
        super().__init__(samples, size)
        self._raw, plan, needs = samples, samples.plan, samples.needs
        self._scenes = needs.composite and plan.views.composite == "scenes"
        side = plan.composite_size if self._scenes else (0, 0)
        self._images: list[Pixels] = [np.empty((0, 0, 3), np.uint8)] * size
        self._partners: list[Pixels | None] = [None] * size
        self._base = np.zeros((size, 6), dtype=np.int32)
        self._crop_rows = np.zeros((size, self.crops, 6), dtype=np.int32)
        self._composite = np.empty((size, *side, 3), dtype=np.uint8)
        self._background = np.zeros((size, 6), dtype=np.int32)
        self._persons = np.zeros((size, 2, 6), dtype=np.int32)
        self._corners = np.zeros((size, 2, 2), dtype=np.int32)

    def show(self, row: int, sample: Sample, base: ViewSpec, crops: Sequence[ViewSpec]) -> None:
        """Keep the image and the boxes."""
        self._images[row] = sample.image
        self._base[row] = _numbers(row, base)
        for i, crop in enumerate(crops):
            self._crop_rows[row, i] = _numbers(row, crop)

    def compose(self, row: int, sample: Sample, index: int, stored: Spec | None) -> Spec:
        """Render a crop of a scene; else keep the boxes, and the partner's image."""
        composer = self.samples.composer
        if self._scenes:
            drawn = composer.draw(sample.key, index, sample.image, sample.neighbours, stored)
            self._composite[row] = drawn.pixels
            return drawn.spec
        pair = composer.pair(sample.key, index, sample.size, sample.neighbours, stored)
        spec, self._partners[row] = pair
        self._background[row] = _numbers(spec.background, spec.background_view)
        self._persons[row] = [_numbers(row, view) for view in spec.persons]
        self._corners[row] = spec.corners
        return spec

    def finish(self) -> RawBatch:
        """The batch."""
        images = list(self._images)
        for row, partner in enumerate(self._partners):
            if partner is not None:
                self._persons[row, 1, 0] = len(images)
                images.append(partner)
        pairs = None
        if self.samples.needs.composite and not self._scenes:
            pairs = Pairs(self._background, self._persons, self._corners)
        return RawBatch(
            keys=tuple(self.keys),
            originals=_joined(images),
            base=self._base,
            crops=self._crop_rows,
            pairs=pairs,
            composite=self._composite,
            backgrounds=self._raw.backgrounds,
            photometric=self.noise,
            records=self.records(),
            regions=self.regions,
            boxes=self.boxes(),
        )


def _numbers(picture: int, view: ViewSpec) -> tuple[int, ...]:
    return (picture, *view.box, int(view.flip))


def _joined(images: Sequence[Pixels]) -> Pictures:
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64).reshape(-1, 2)
    flat = [image.reshape(-1, 3) for image in images]
    return Pictures(np.concatenate(flat) if flat else np.empty((0, 3), np.uint8), sizes)
