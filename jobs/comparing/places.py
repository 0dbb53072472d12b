"""Chosen samples of finished shards, read and rendered as training does it."""

from collections.abc import Iterator, Sequence

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
from dpal.base.recipe import Recipe
from dpal.batch import Needs, RawBatch, TrainBatch
from dpal.chance import generator
from dpal.device_render import DeviceRenderer
from dpal.views.plan import ViewPlan

BATCH = 8  # samples of a forward
A_SHARD = 2  # samples of one shard: so many are read, or fetched, that they tell of the whole cache


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


class PlaceBatches:
    """What the training loader makes of chosen samples, with every kind of view of the cache.

    Args:
        recipe: with one teacher.
        manifest: shards whose targets are finished.
        device: where views are rendered, where the recipe renders on a device.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        pool: BackgroundPool,
        cache: TargetCache,
        device: torch.device,
    ) -> None:
        self.recipe, self.manifest, self.pool, self.cache = recipe, manifest, pool, cache
        self.device = device
        self.plan = ViewPlan(recipe.seed, recipe.views, recipe.train.seed)
        self.store = open_store(recipe.data.shards, recipe.storage)
        self.copies: LocalCache | None = open_local_cache(recipe.storage)

    def batches(
        self, places: Sequence[Place], wanted: Needs
    ) -> Iterator[tuple[Sequence[Place], TrainBatch]]:
        """The samples in groups of `BATCH`. Raises DataError when something cannot be read.

        Args:
            wanted: views that a task looks at.
        """
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
