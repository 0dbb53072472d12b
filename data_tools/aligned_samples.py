"""Samples of the methods that align a student with teachers: views, joined with their targets.

With caches, the pixels are rendered from the specs that the target records carry, so a student
sees exactly what its teachers saw; without, from the view plan. Colour noise is only drawn here:
pixels are clean, and the noise is applied on the training device.
"""

from collections.abc import Sequence

import numpy as np

from data_tools.backgrounds import BackgroundPool
from data_tools.composites import Composer
from data_tools.feature_cache import TargetCache, series_of
from data_tools.local_cache import LocalCache
from data_tools.manifest import Manifest
from data_tools.opened import OPENING, Opened
from data_tools.sample import Sample, SampleError
from data_tools.target_tar import TargetShard
from dpal.base.errors import DataError
from dpal.batch import Boxes, Needs, Records, TrainBatch
from dpal.record import Kind, Spec, stored_spec
from dpal.views import BLUR_PROBABILITY, Photometric, ViewPlan, ViewSpec, render


class AlignedSamples:
    """Renders a `TrainBatch` (a `data_tools.loader.SampleRenderer`).

    Args:
        plan: decides the views.
        backgrounds: behind the composites, or the scenes that they are crops of.
        needs: which views are rendered.
        caches: a finished target cache of every teacher; empty with online teachers.
        shards_at_once: image shards whose targets are kept open.
        copies: local copies of target shards fetched from remote storage; None: in memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: ViewPlan,
        backgrounds: BackgroundPool,
        needs: Needs,
        caches: Sequence[TargetCache],
        *,
        shards_at_once: int,
        copies: LocalCache | None = None,
    ) -> None:
        self.plan, self.needs = plan, needs
        self.composer = Composer(plan, backgrounds)
        self.num_teachers = len(caches)
        self._series = series_of(plan.views) if caches else ()
        self._shards: Opened[tuple[int, str, int], TargetShard] = Opened(
            shards_at_once * max(1, len(caches) * len(self._series)),
            lambda key: caches[key[0]].shard(key[1], manifest.shards[key[2]], copies),
            OPENING,
        )

    def expect(self, shard: int) -> None:
        """Have the targets of a shard opened: any of its views may be asked for."""
        for teacher in range(self.num_teachers):
            for series in self._series:
                self._shards.request((teacher, series, shard))

    def start(self, size: int) -> "_Filling":
        """Begin a batch of `size` samples."""
        return _Filling(self, size)

    def record(self, teacher: int, series: str, sample: Sample) -> np.ndarray:
        """A teacher's target record of one view of a sample, uint8 [R]."""
        shard = self._shards.get((teacher, series, sample.place.shard))
        try:
            record: np.ndarray = shard.records([sample.place.row])[0]
        except DataError as error:
            raise SampleError(str(error)) from None
        return record


class _Filling:
    """A batch under way; rows are independent, so threads need no lock."""

    def __init__(self, samples: AlignedSamples, size: int) -> None:
        plan, needs = samples.plan, samples.needs
        crops = plan.views.crops if needs.crops else 0
        side = plan.composite_size if needs.composite else (0, 0)
        self._samples, self._crops = samples, crops
        self._keys = [""] * size
        self._base = np.empty((size, *plan.size, 3), dtype=np.uint8)
        self._crop_rows = np.empty((size, crops, *plan.crop_size, 3), dtype=np.uint8)
        self._composite = np.empty((size, *side, 3), dtype=np.uint8)
        self._noise = np.zeros((size, 2 + crops, 6), dtype=np.float32)
        self._noise[:, :, :3] = 1.0
        self._base_records: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._composite_records: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._boxes: list[np.ndarray] = [np.empty((0, 4), dtype=np.float32)] * size

    def fill(self, row: int, sample: Sample) -> None:
        """Render one sample and fetch its target records."""
        plan, key, epoch = self._samples.plan, sample.key, sample.place.epoch
        self._keys[row] = key
        view = plan.view_index(key, epoch)
        spec = self._base_spec(row, sample, view)
        self._base[row] = render(sample.image, spec, plan.size)
        if self._samples.needs.composite:
            self._compose(row, sample, plan.composite_index(key, epoch))
        if self._crops:
            for i, crop in enumerate(plan.crops(key, view, epoch, sample.size)):
                self._crop_rows[row, i] = render(sample.image, crop, plan.crop_size)
        if plan.views.photometric != "off":
            self._noise[row] = self._drawn_noise(key, epoch)

    def finish(self) -> TrainBatch:
        """The batch."""
        size, teachers = len(self._keys), self._samples.num_teachers
        nothing = np.empty((size, 0), dtype=np.uint8)

        def stacked(rows: list[list[np.ndarray]], teacher: int) -> np.ndarray:
            return np.stack([row[teacher] for row in rows]) if rows[0] else nothing

        return TrainBatch(
            keys=tuple(self._keys),
            base=self._base,
            crops=self._crop_rows,
            composite=self._composite,
            photometric=self._noise,
            records=tuple(
                Records(stacked(self._base_records, i), stacked(self._composite_records, i))
                for i in range(teachers)
            ),
            boxes=_padded(self._boxes) if self._samples.needs.boxes else None,
        )

    def _compose(self, row: int, sample: Sample, index: int) -> None:
        composer = self._samples.composer
        records, stored = self._stored(sample, f"composite-{index}", "composite")
        self._composite_records[row] = records
        drawn = composer.draw(sample.key, index, sample.image, sample.neighbours, stored)
        self._composite[row] = drawn.pixels
        if self._samples.needs.boxes:
            self._boxes[row] = composer.boxes(drawn.spec)

    def _drawn_noise(self, key: str, epoch: int) -> list[Photometric]:
        """Of every view; that of pinned views is pinned with them if the recipe says so."""
        plan = self._samples.plan
        kinds = ("base", "composite", *("crop" for _ in range(self._crops)))
        rows = [
            plan.photometric(key, epoch, number, BLUR_PROBABILITY[kind])
            for number, kind in enumerate(kinds)
        ]
        if plan.views.photometric == "pinned":
            rows[0] = plan.pinned_photometric(key, "base", plan.view_index(key, epoch))
            if self._samples.needs.composite:
                index = plan.composite_index(key, epoch)
                rows[1] = plan.pinned_photometric(key, "composite", index)
        return rows

    def _base_spec(self, row: int, sample: Sample, view: int) -> ViewSpec:
        self._base_records[row], stored = self._stored(sample, f"view-{view}", "view")
        if stored is None:
            return self._samples.plan.base(sample.key, view, sample.size)
        assert isinstance(stored, ViewSpec)
        return stored

    def _stored(
        self, sample: Sample, series: str, kind: Kind
    ) -> tuple[list[np.ndarray], Spec | None]:
        """Every teacher's record, and the spec they carry; None without caches.

        Raises:
            DataError: when two teachers were shown different pixels.
        """
        teachers = range(self._samples.num_teachers)
        records = [self._samples.record(teacher, series, sample) for teacher in teachers]
        specs = [stored_spec(record, kind) for record in records]
        if any(spec != specs[0] for spec in specs):
            raise DataError(
                f"sample {sample.key!r}: the teachers' caches hold targets of different views "
                f"({series}); run `dpal cache` with this recipe"
            )
        return records, specs[0] if specs else None


def _padded(boxes: Sequence[np.ndarray]) -> Boxes:
    """Boxes of every row, padded with zeros to the fullest."""
    counts = np.array([len(rows) for rows in boxes], dtype=np.int64)
    corners = np.zeros((len(boxes), max(1, counts.max()), 4), dtype=np.float32)
    for row, own in enumerate(boxes):
        corners[row, : len(own)] = own
    return Boxes(corners, counts)
