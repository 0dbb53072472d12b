"""Stored targets beside those that the teacher gives for the loader's own pixels, sample by sample.

Legend: B samples of a forward, N patches, D teacher width.
"""

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import BackgroundPool
from data_tools.decode import decode_rgb
from data_tools.feature_cache import TargetCache
from data_tools.local_cache import LocalCache, open_local_cache
from data_tools.manifest import Manifest
from data_tools.order import Place
from data_tools.raw_samples import RawSamples
from data_tools.salvage import salvage_shard
from data_tools.sample import BatchBuilder, Pixels, Sample, SampleError
from data_tools.shard import DamagedShard, Shard, read_shard
from data_tools.storage import open_store
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.batch import Needs, RawBatch, TrainBatch
from dpal.chance import generator
from dpal.device_render import DeviceRenderer
from dpal.method.build import build_task
from dpal.parity import Bounds, Compared, bounds_of, compare
from dpal.record import Kind
from dpal.target_source import CachedTargets, OnlineTargets, Targets
from dpal.targets.header import TargetHeader
from dpal.task import Moment, Task
from dpal.views.plan import ViewPlan
from jobs.caching.plan import covariance_of, teacher_of

BATCH = 8  # samples of a forward
A_SHARD = 2  # samples of one shard: so many are read, or fetched, that they tell of the whole cache


@dataclass(frozen=True)
class TeacherParity:
    """One teacher's cache beside the teacher.

    Attributes:
        cache: URL of the cache.
        samples, tokens: that were compared, in base views and composites together.
        median_cosine, smallest_cosine: of stored tokens with the teacher's after the same codec;
            the median is that of base views or of composites, whichever is smaller.
        largest_steps: largest difference of a patch number, in steps of the codec.
        largest_excess: largest difference as a share of what is accepted.
        worst: series and key of the record that differs most.
        codec_cosine: median cosine of stored patch tokens with the teacher's own: the codec's cost.
        losses: every loss term of the untrained student, from stored targets and from the teacher.
        accepted: the bounds.
        seconds: that it took, loading the teacher included.
    """

    cache: str
    samples: int
    tokens: int
    median_cosine: float
    smallest_cosine: float
    largest_steps: float
    largest_excess: float
    worst: str
    codec_cosine: float
    losses: Mapping[str, tuple[float, float]]
    accepted: Bounds
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether stored targets are what the teacher says."""
        return (
            self.median_cosine >= self.accepted.median
            and self.smallest_cosine >= self.accepted.smallest
            and self.largest_excess <= 1
        )

    @property
    def loss_errors(self) -> dict[str, float]:
        """Relative error of every loss term against the teacher's."""
        return {
            name: abs(stored - online) / max(abs(online), 1e-12)
            for name, (stored, online) in self.losses.items()
        }


class _Held:
    """A target source that gives what it was handed: the task sees one batch with two targets."""

    def __init__(self, header: TargetHeader, covariance: np.ndarray | None) -> None:
        self.header, self.covariance = header, covariance
        self.targets: Targets | None = None

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        assert self.targets is not None, "nothing was handed over"
        return self.targets


class ParityMeter:
    """Measures the caches of one recipe's teachers, one teacher at a time.

    Args:
        recipe: with one teacher.
        manifest: shards whose targets are finished.
        device: where the teacher and the student run.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        pool: BackgroundPool,
        cache: TargetCache,
        device: str,
    ) -> None:
        self.recipe, self.manifest, self.pool, self.cache = recipe, manifest, pool, cache
        self.device = torch.device(device)
        self.plan = ViewPlan(recipe.seed, recipe.views, recipe.train.seed)
        self.store = open_store(recipe.data.shards, recipe.storage)
        self.copies: LocalCache | None = open_local_cache(recipe.storage)
        self.held = _Held(cache.header, covariance_of(recipe, cache))

    def measure(self, places: Sequence[Place]) -> TeacherParity:
        """Compare the records of `places`. Raises DataError when something cannot be read."""
        begin = time.monotonic()
        bounds = bounds_of(
            self.cache.layout("view-0").storage, getattr(self.recipe.teacher, "precision", "fp32")
        )
        rows, losses = _Rows(), []
        task = self._task()
        online = OnlineTargets(teacher_of(self.recipe).to(self.device), self.cache.header)
        stored = CachedTargets(self.cache.header)
        for group, batch in self._batches(places, task):
            with torch.inference_mode():
                now = online(batch, self.device)
            self._compare(rows, batch, group, now, bounds)
            losses.append(
                [self._losses(task, batch, one) for one in (stored(batch, self.device), now)]
            )
        del online, task, now  # so that training does not share memory with a teacher
        _free(self.device)
        return rows.summary(
            self.cache.store.url, len(places), losses, bounds, time.monotonic() - begin
        )

    def _task(self) -> Task:
        task = build_task(self.recipe, [self.held], RunLayout(self.recipe.run_dir).teacher)
        return task.to(self.device)

    def _batches(
        self, places: Sequence[Place], task: Task
    ) -> Iterator[tuple[Sequence[Place], TrainBatch]]:
        """What the training loader makes of the samples, with every kind of view of the cache."""
        wanted = getattr(task, "needs", Needs(crops=False, composite=False))
        needs = wanted._replace(composite=bool(self.recipe.views.composites))
        on_device = self.recipe.train.render == "device"
        kind = RawSamples if on_device else AlignedSamples
        samples = kind(
            self.manifest,
            self.plan,
            self.pool,
            needs,
            [self.cache],
            shards_at_once=2,
            copies=self.copies,
        )
        renderer = DeviceRenderer(self.plan) if on_device else None
        for start in range(0, len(places), BATCH):
            group = places[start : start + BATCH]
            builder = samples.start(len(group))
            for row, place in enumerate(group):
                self._fill(builder, row, place)
            batch = builder.finish()
            if isinstance(batch, RawBatch):
                assert renderer is not None
                batch = renderer(batch, self.device)
            yield group, batch

    def _fill(self, builder: BatchBuilder, row: int, place: Place) -> None:
        """Fill a row with its sample, or with the next one of the shard that is not damaged.

        Whether damage is borne is the training loader's business, and counted there.
        """
        shard = self._shard(place.shard)
        for ahead in range(len(shard)):
            now = place._replace(row=(place.row + ahead) % len(shard))
            try:
                builder.fill(row, Sample(shard, now, self._decode))
            except SampleError:
                continue
            return
        raise DataError(f"shard {shard.ref.name!r} holds damaged samples alone")

    def _shard(self, index: int) -> Shard:
        ref = self.manifest.shards[index]
        try:
            return read_shard(self.store, ref, self.copies)
        except DamagedShard:
            if not self.recipe.data.max_skip_fraction:
                raise
            return salvage_shard(self.store, ref)

    def _decode(self, shard: Shard, row: int, out: Pixels | None) -> Pixels:
        try:
            return decode_rgb(shard.image_bytes(row), self.recipe.data.max_pixels, out=out)
        except DataError as error:
            raise SampleError(str(error)) from None

    def _compare(
        self,
        rows: "_Rows",
        batch: TrainBatch,
        group: Sequence[Place],
        now: Targets,
        bounds: Bounds,
    ) -> None:
        plan, (records,) = self.plan, batch.records
        pairs: list[tuple[Kind, np.ndarray, object]] = [("view", records.base, now.base)]
        pairs += [("composite", records.composite, now.composite)] if now.composite else []
        for kind, stored, tokens in pairs:
            index = plan.view_index if kind == "view" else plan.composite_index
            names = [
                f"{kind}-{index(key, place.epoch)} of sample {key!r}"
                for key, place in zip(batch.keys, group, strict=True)
            ]
            rows.add(kind, names, compare(stored, tokens, self.cache.header, kind, bounds.noise))

    def _losses(self, task: Task, batch: TrainBatch, targets: Targets) -> dict[str, float]:
        spec = self.recipe.train
        moment = Moment(0, 1, self.manifest.num_samples, spec.global_batch)
        self.held.targets = targets
        with torch.no_grad():
            terms = task(batch, moment).terms
        return {name: float(term) for name, term in zip(task.terms, terms, strict=True)}


class _Rows:
    """What was compared so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.parts: list[Compared] = []
        self.kinds: list[Kind] = []

    def add(self, kind: Kind, names: Sequence[str], compared: Compared) -> None:
        self.names += names
        self.kinds.append(kind)
        self.parts.append(compared)

    def of(self, kind: Kind) -> list[Compared]:
        return [part for own, part in zip(self.kinds, self.parts, strict=True) if own == kind]

    def summary(
        self,
        cache: str,
        samples: int,
        losses: Sequence[Sequence[Mapping[str, float]]],
        bounds: Bounds,
        seconds: float,
    ) -> TeacherParity:
        medians = [
            np.median(np.concatenate([part.cosines.ravel() for part in self.of(kind)]))
            for kind in ("view", "composite")
            if self.of(kind)
        ]
        smallest = np.concatenate([part.cosines.min(axis=1) for part in self.parts])
        excess = np.concatenate([part.excess for part in self.parts])
        # How far each record is beyond either bound; the first of equals.
        beyond = np.maximum(excess, (1 - smallest) / (1 - bounds.smallest))
        terms = losses[0][0]
        means = {
            name: (
                float(np.mean([pair[0][name] for pair in losses])),
                float(np.mean([pair[1][name] for pair in losses])),
            )
            for name in terms
        }
        return TeacherParity(
            cache=cache,
            samples=samples,
            tokens=sum(part.cosines.size for part in self.parts),
            median_cosine=float(min(medians)),
            smallest_cosine=float(smallest.min()),
            largest_steps=float(max(part.steps.max() for part in self.parts)),
            largest_excess=float(excess.max()),
            worst=self.names[int(beyond.argmax())],
            codec_cosine=float(
                np.median(np.concatenate([part.codec_cosines.ravel() for part in self.parts]))
            ),
            losses=means,
            accepted=bounds,
            seconds=seconds,
        )


def draw_places(recipe: Recipe, manifest: Manifest, samples: int, seed: int) -> list[Place]:
    """Random samples of random shards, in the order of shards, at random epochs: so of any view.

    Args:
        seed: another one draws others.
    """
    rng = generator(recipe.seed, "parity", recipe.name, seed)
    num_shards = min(len(manifest.shards), -(-samples // A_SHARD))
    shards = sorted(rng.choice(len(manifest.shards), num_shards, replace=False).tolist())
    epochs = recipe.views.count * max(1, recipe.views.composites)
    places: list[Place] = []
    for number, shard in enumerate(shards):
        share = len(range(number, samples, num_shards))
        size = manifest.shards[shard].num_samples
        rows = rng.choice(size, share, replace=share > size)
        places += [Place(int(rng.integers(epochs)), shard, int(row)) for row in sorted(rows)]
    return places


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
