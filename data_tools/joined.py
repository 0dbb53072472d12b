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
from data_tools.sample import Pixels, Sample, SampleError
from data_tools.target_tar import TargetShard
from dpal.base.errors import DataError
from dpal.batch import Boxes, Needs, Records
from dpal.record import Kind, Spec, stored_spec
from dpal.views.boxes import region_in_view
from dpal.views.plan import BLUR_PROBABILITY, ViewPlan
from dpal.views.specs import Photometric, ViewSpec

_Key = tuple[int, str, int]  # teacher, series, shard


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
        self._caches = caches
        self._series = series_of(plan.views) if caches else ()
        # Which records were found whole, a byte each; kept when the shard is closed.
        self._checked: dict[_Key, bytearray] = {}

        def open_targets(key: _Key) -> TargetShard:
            teacher, series, index = key
            shard = caches[teacher].shard(series, manifest.shards[index], copies)
            shard.trust(self._checked.setdefault(key, shard.checked))
            return shard

        self._shards: Opened[_Key, TargetShard] = Opened(
            shards_at_once * max(1, len(caches) * len(self._series)), open_targets, OPENING
        )

    def expect(self, shard: int) -> None:
        """Have the targets of a shard opened: any of its views may be asked for."""
        for teacher in range(self.num_teachers):
            for series in self._series:
                self._shards.request((teacher, series, shard))

    def forget(self) -> None:
        """Take back the targets that no thread has begun to open."""
        self._shards.forget_waiting()

    def room_for_records(self, size: int) -> tuple[Records, ...]:
        """Unfilled target records of `size` samples, of every teacher."""

        def room(cache: TargetCache, kind: Kind, wanted: bool) -> Pixels:
            return np.empty((size, cache.header.layout(kind).num_bytes if wanted else 0), np.uint8)

        return tuple(
            Records(room(cache, "view", True), room(cache, "composite", self.needs.composite))
            for cache in self._caches
        )

    def read_record(self, teacher: int, series: str, sample: Sample, out: Pixels) -> None:
        """Copy a teacher's target record of one view of a sample into uint8 [R]."""
        shard = self._shards.get((teacher, series, sample.place.shard))
        try:
            shard.read(sample.place.row, out)
        except DataError as error:
            raise SampleError(str(error)) from None


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
        self.regions = np.empty((size, self.crops, 4), dtype=np.float32)
        self._records = samples.room_for_records(size)
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
        for i, crop in enumerate(crops):
            self.regions[row, i] = region_in_view(crop, spec)
        if self.samples.needs.composite:
            self._compose(row, sample, plan.composite_index(key, epoch))
        if plan.views.photometric != "off":
            self.noise[row] = self._drawn_noise(key, epoch)

    def records(self) -> tuple[Records, ...]:
        """Of every teacher."""
        return self._records

    def boxes(self) -> Boxes | None:
        """Of the persons in composites, where they are needed."""
        return _padded(self._boxes) if self.samples.needs.boxes else None

    def _compose(self, row: int, sample: Sample, index: int) -> None:
        rooms = [records.composite[row] for records in self._records]
        stored = self._stored(sample, f"composite-{index}", "composite", rooms)
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
        rooms = [records.base[row] for records in self._records]
        stored = self._stored(sample, f"view-{view}", "view", rooms)
        if stored is None:
            return self.samples.plan.base(sample.key, view, sample.size)
        assert isinstance(stored, ViewSpec)
        return stored

    def _stored(
        self, sample: Sample, series: str, kind: Kind, rooms: Sequence[Pixels]
    ) -> Spec | None:
        """Read every teacher's record; the spec that they carry, None without caches.

        Raises:
            DataError: when two teachers were shown different pixels.
        """
        for teacher, room in enumerate(rooms):
            self.samples.read_record(teacher, series, sample, room)
        specs = [stored_spec(room, kind) for room in rooms]
        if any(spec != specs[0] for spec in specs):
            raise DataError(
                f"sample {sample.key!r}: the teachers' caches hold targets of different views "
                f"({series}); run `dpal cache` with this recipe"
            )
        return specs[0] if specs else None


def _padded(boxes: Sequence[np.ndarray]) -> Boxes:
    """Boxes of every row, padded with zeros to the fullest."""
    counts = np.array([len(rows) for rows in boxes], dtype=np.int64)
    corners = np.zeros((len(boxes), max(1, counts.max()), 4), dtype=np.float32)
    for row, own in enumerate(boxes):
        corners[row, : len(own)] = own
    return Boxes(corners, counts)
