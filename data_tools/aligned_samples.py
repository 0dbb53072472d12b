"""Samples of the methods that align a student with teachers, rendered by the loader."""

from collections.abc import Sequence

import numpy as np

from data_tools.joined import JoinedRows, JoinedSamples
from data_tools.sample import Sample
from dpal.batch import TrainBatch
from dpal.record import Spec
from dpal.views.render import render
from dpal.views.specs import ViewSpec


class AlignedSamples(JoinedSamples):
    """Renders a `TrainBatch` (a `data_tools.loader.SampleRenderer`)."""

    def start(self, size: int) -> "_Rendering":
        """Begin a batch of `size` samples."""
        return _Rendering(self, size)


class _Rendering(JoinedRows):
    """Pixels of every view, in one buffer a kind."""

    def __init__(self, samples: AlignedSamples, size: int) -> None:
        super().__init__(samples, size)
        plan = samples.plan
        side = plan.composite_size if samples.needs.composite else (0, 0)
        self._base = np.empty((size, *plan.size, 3), dtype=np.uint8)
        self._crop_rows = np.empty((size, self.crops, *plan.crop_size, 3), dtype=np.uint8)
        self._composite = np.empty((size, *side, 3), dtype=np.uint8)

    def show(self, row: int, sample: Sample, base: ViewSpec, crops: Sequence[ViewSpec]) -> None:
        """Render them."""
        plan = self.samples.plan
        self._base[row] = render(sample.image, base, plan.size)
        for i, crop in enumerate(crops):
            self._crop_rows[row, i] = render(sample.image, crop, plan.crop_size)

    def compose(self, row: int, sample: Sample, index: int, stored: Spec | None) -> Spec:
        """Render it."""
        composer = self.samples.composer
        drawn = composer.draw(sample.key, index, sample.image, sample.neighbours, stored)
        self._composite[row] = drawn.pixels
        return drawn.spec

    def finish(self) -> TrainBatch:
        """The batch."""
        return TrainBatch(
            keys=tuple(self.keys),
            base=self._base,
            crops=self._crop_rows,
            composite=self._composite,
            photometric=self.noise,
            records=self.records(),
            regions=self.regions,
            boxes=self.boxes(),
        )
