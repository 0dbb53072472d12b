"""Samples of SAIP: fresh views of a person and a background, without any targets."""

import numpy as np

from data_tools.backgrounds import BackgroundPool
from data_tools.sample import Sample
from dpal.saip.batch import SaipBatch
from dpal.saip.views import NOISE_COLUMNS, SaipPlan, render_saip


class SaipSamples:
    """Renders a `SaipBatch` (a `data_tools.loader.SampleRenderer`).

    Args:
        plan: decides the views.
        backgrounds: behind the scenes.
    """

    def __init__(self, plan: SaipPlan, backgrounds: BackgroundPool) -> None:
        self.plan, self.backgrounds = plan, backgrounds

    def expect(self, shard: int) -> None:
        """Nothing of a shard but its images is needed."""

    def forget(self) -> None:
        """So nothing is waited for."""

    def start(self, size: int) -> "_Filling":
        """Begin a batch of `size` samples."""
        return _Filling(self, size)


class _Filling:
    """A batch under way; rows are independent, so threads need no lock."""

    def __init__(self, samples: SaipSamples, size: int) -> None:
        plan = samples.plan
        self._plan, self._backgrounds = plan, samples.backgrounds
        self._keys = [""] * size
        self._globals = np.empty((size, 2, *plan.size, 3), dtype=np.uint8)
        self._locals = np.empty((size, plan.local_crops, *plan.local_size, 3), dtype=np.uint8)
        self._background = np.empty((size, *plan.scene_size, 3), dtype=np.uint8)
        self._corners = np.empty((size, 2, 2), dtype=np.int64)
        self._noise = np.zeros((size, 3 + plan.local_crops, NOISE_COLUMNS), dtype=np.float32)
        self._noise[:, :, :3] = 1.0  # factors of brightness, contrast and saturation

    def fill(self, row: int, sample: Sample) -> None:
        """Render every view of one sample."""
        plan, key, epoch = self._plan, sample.key, sample.place.epoch
        spec = plan.spec(key, epoch, sample.size, self._backgrounds.sizes)
        pixels = render_saip(sample.image, self._backgrounds.images, spec, plan)
        self._keys[row] = key
        self._globals[row], self._locals[row] = pixels.globals, pixels.locals
        self._background[row], self._corners[row] = pixels.background, pixels.corners
        if plan.views.photometric == "free":
            self._noise[row] = plan.noise(key, epoch)

    def finish(self) -> SaipBatch:
        """The batch."""
        return SaipBatch(
            keys=tuple(self._keys),
            globals=self._globals,
            locals=self._locals,
            background=self._background,
            corners=self._corners,
            photometric=self._noise,
        )
