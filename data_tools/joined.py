"""Samples joined with their targets: which views of an image, and what the teachers say of them.

With caches, specs are those that the target records carry, so a student sees exactly what its
teachers saw; without, those of the view plan. Colour noise is only drawn here: pixels are clean,
and the noise is applied on the training device.
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
from dpal.batch import Boxes, Needs, Records
from dpal.record import Kind, Spec, stored_spec
from dpal.views import BLUR_PROBABILITY, Photometric, ViewPlan, ViewSpec


class JoinedSamples:
    """View specs and target records of samples; subclasses say what a batch is made of.

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

    def record(self, teacher: int, series: str, sample: Sample) -> np.ndarray:
        """A teacher's target record of one view of a sample, uint8 [R]."""
        shard = self._shards.get((teacher, series, sample.place.shard))
        try:
            record: np.ndarray = shard.records([sample.place.row])[0]
        except DataError as error:
            raise SampleError(str(error)) from None
        return record


class JoinedRows:
    """A batch under way; rows are independent, so threads need no lock.

    Subclasses keep what becomes pixels: `show` is told the specs of a sample's base view and local
    crops, `compose` puts its composite together.
    """

    def __init__(self, samples: JoinedSamples, size: int) -> None:
        self.samples = samples
        self.crops = samples.plan.views.crops if samples.needs.crops else 0
        self.keys = [""] * size
        self.noise = np.zeros((size, 2 + self.crops, 6), dtype=np.float32)
        self.noise[:, :, :3] = 1.0
        self._base_records: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._composite_records: list[list[np.ndarray]] = [[] for _ in range(size)]
        self._boxes: list[np.ndarray] = [np.empty((0, 4), dtype=np.float32)] * size

    def show(self, row: int, sample: Sample, base: ViewSpec, crops: Sequence[ViewSpec]) -> None:
        """Keep a sample's base view and local crops."""
        raise NotImplementedError

    def compose(self, row: int, sample: Sample, index: int, stored: Spec | None) -> Spec:
        """Keep composite `index` of a sample, and return how it is put together."""
        raise NotImplementedError

    def fill(self, row: int, sample: Sample) -> None:
        """Choose every view of one sample and fetch its target records."""
        plan, key, epoch = self.samples.plan, sample.key, sample.place.epoch
        self.keys[row] = key
        view = plan.view_index(key, epoch)
        spec = self._base_spec(row, sample, view)
        crops = plan.crops(key, view, epoch, sample.size) if self.crops else []
        self.show(row, sample, spec, crops)
        if self.samples.needs.composite:
            self._compose(row, sample, plan.composite_index(key, epoch))
        if plan.views.photometric != "off":
            self.noise[row] = self._drawn_noise(key, epoch)

    def records(self) -> tuple[Records, ...]:
        """Of every teacher."""
        nothing = np.empty((len(self.keys), 0), dtype=np.uint8)

        def stacked(rows: list[list[np.ndarray]], teacher: int) -> np.ndarray:
            return np.stack([row[teacher] for row in rows]) if rows[0] else nothing

        return tuple(
            Records(stacked(self._base_records, i), stacked(self._composite_records, i))
            for i in range(self.samples.num_teachers)
        )

    def boxes(self) -> Boxes | None:
        """Of the persons in composites, where they are needed."""
        return _padded(self._boxes) if self.samples.needs.boxes else None

    def _compose(self, row: int, sample: Sample, index: int) -> None:
        series = f"composite-{index}"
        self._composite_records[row], stored = self._stored(sample, series, "composite")
        spec = self.compose(row, sample, index, stored)
        if self.samples.needs.boxes:
            self._boxes[row] = self.samples.composer.boxes(spec)

    def _drawn_noise(self, key: str, epoch: int) -> list[Photometric]:
        """Of every view; that of pinned views is pinned with them if the recipe says so."""
        plan = self.samples.plan
        kinds = ("base", "composite", *("crop" for _ in range(self.crops)))
        rows = [
            plan.photometric(key, epoch, number, BLUR_PROBABILITY[kind])
            for number, kind in enumerate(kinds)
        ]
        if plan.views.photometric == "pinned":
            rows[0] = plan.pinned_photometric(key, "base", plan.view_index(key, epoch))
            if self.samples.needs.composite:
                index = plan.composite_index(key, epoch)
                rows[1] = plan.pinned_photometric(key, "composite", index)
        return rows

    def _base_spec(self, row: int, sample: Sample, view: int) -> ViewSpec:
        self._base_records[row], stored = self._stored(sample, f"view-{view}", "view")
        if stored is None:
            return self.samples.plan.base(sample.key, view, sample.size)
        assert isinstance(stored, ViewSpec)
        return stored

    def _stored(
        self, sample: Sample, series: str, kind: Kind
    ) -> tuple[list[np.ndarray], Spec | None]:
        """Every teacher's record, and the spec they carry; None without caches.

        Raises:
            DataError: when two teachers were shown different pixels.
        """
        teachers = range(self.samples.num_teachers)
        records = [self.samples.record(teacher, series, sample) for teacher in teachers]
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
