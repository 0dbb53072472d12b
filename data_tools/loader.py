"""The training loader: threads decode and render straight into one batch buffer.

A rank reads its slice of every global batch of the order, joins images and target records by key,
and keeps a few batches ready. Where it is in the data follows from the step alone.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Generic, TypeVar, cast

import numpy as np

from data_tools.backgrounds import BackgroundPool
from data_tools.decode import decode_rgb
from data_tools.feature_cache import TargetCache
from data_tools.manifest import Manifest
from data_tools.order import WINDOW_SHARDS, Order, Place
from data_tools.shard import Shard, read_shard
from data_tools.storage import ObjectStore
from data_tools.target_tar import TargetShard
from dpal.base.telemetry import Telemetry
from dpal.batch import TrainBatch
from dpal.record import stored_spec
from dpal.views import CompositeSpec, ViewPlan, ViewSpec, render, render_composite

BLUR_PROBABILITY = {"base": 1.0, "composite": 0.1, "crop": 0.5}
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_NO_RECORD = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True)
class Slice:
    """Which part of every global batch this rank reads.

    Attributes:
        global_batch: samples of one optimiser step.
        micro_batch: samples of one forward on this rank.
        rank, world_size: place of this rank.
    """

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    def starts(self, step: int) -> Iterator[int]:
        """First position in the order of each micro-batch of `step`."""
        share = self.global_batch // self.world_size
        first = step * self.global_batch + self.rank * share
        yield from range(first, first + share, self.micro_batch)


class Loader:
    """Micro-batches of a run for one rank (a `dpal.batch.BatchSource`).

    Args:
        store: where the image shards lie.
        cache: finished target cache to join; None with an online teacher.
        threads: decoding threads.
        prefetch: micro-batches prepared ahead.
        cache_dir: local folder for shards fetched from remote storage.
        telemetry: told of images that only the slow decoder reads.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        plan: ViewPlan,
        backgrounds: BackgroundPool,
        cache: TargetCache | None,
        part: Slice,
        *,
        max_pixels: int,
        threads: int,
        prefetch: int,
        cache_dir: Path,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.num_samples = manifest.num_samples
        self._order = Order(plan.seed, tuple(ref.num_samples for ref in manifest.shards))
        self._plan, self._backgrounds, self._part = plan, backgrounds, part
        self._cached, self._max_pixels = cache is not None, max_pixels
        self._threads, self._prefetch, self._telemetry = threads, prefetch, telemetry
        refs = manifest.shards
        self._shards: _Recent[int, Shard] = _Recent(
            2 * WINDOW_SHARDS, lambda i: read_shard(store, refs[i], cache_dir)
        )
        self._targets: _Recent[tuple[str, int], TargetShard] = _Recent(
            2 * WINDOW_SHARDS * (plan.views.count + plan.views.composites),
            lambda key: cast(TargetCache, cache).shard(key[0], refs[key[1]], cache_dir),
        )

    def batches(self, start_step: int) -> Iterator[TrainBatch]:
        """Micro-batches from `start_step` on, without end; closing the iterator stops the threads.

        Raises:
            DataError: a damaged shard, sample or target, or a key that does not match.
            StorageError: storage that cannot be reached.
        """
        ready: queue.Queue[TrainBatch | BaseException] = queue.Queue(self._prefetch)
        stop = threading.Event()
        producer = threading.Thread(
            target=self._produce, args=(start_step, ready, stop), daemon=True, name="loader"
        )
        producer.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            producer.join()

    def _produce(
        self,
        start_step: int,
        ready: "queue.Queue[TrainBatch | BaseException]",
        stop: threading.Event,
    ) -> None:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            for step in count(start_step):
                for start in self._part.starts(step):
                    item: TrainBatch | BaseException
                    try:
                        item = self._batch(start, pool)
                    except BaseException as error:
                        item = error
                    if not _put(ready, item, stop) or isinstance(item, BaseException):
                        return

    def _batch(self, start: int, pool: ThreadPoolExecutor) -> TrainBatch:
        """One micro-batch: every sample is decoded by some thread into its row."""
        places = list(self._order.places(start, self._part.micro_batch))
        plan, size = self._plan, self._part.micro_batch
        base = np.empty((size, *plan.size, 3), dtype=np.uint8)
        crops = np.empty((size, plan.views.crops, *plan.crop_size, 3), dtype=np.uint8)
        composite = np.empty((size, *plan.composite_size, 3), dtype=np.uint8)
        noise = np.zeros((size, 2 + plan.views.crops, 6), dtype=np.float32)
        noise[:, :, :3] = 1.0

        def fill(row: int) -> tuple[str, np.ndarray, np.ndarray]:
            key, image, base_spec, composite_spec, records = self._sample(places[row])
            epoch = places[row].epoch
            base[row] = render(image, base_spec, plan.size)
            background = self._backgrounds.images[composite_spec.background]
            composite[row] = render_composite(image, background, composite_spec, plan)
            index = plan.view_index(key, epoch)
            for i, crop in enumerate(plan.crops(key, index, epoch, _size(image))):
                crops[row, i] = render(image, crop, plan.crop_size)
            if plan.views.photometric == "free":
                noise[row] = self._noise(key, epoch)
            return key, *records

        rows = list(pool.map(fill, range(size)))
        return TrainBatch(
            keys=tuple(key for key, _, _ in rows),
            base=base,
            crops=crops,
            composite=composite,
            photometric=noise,
            base_records=np.stack([record for _, record, _ in rows]),
            composite_records=np.stack([record for _, _, record in rows]),
        )

    def _sample(
        self, place: Place
    ) -> tuple[str, np.ndarray, ViewSpec, CompositeSpec, tuple[np.ndarray, np.ndarray]]:
        """Key, pixels, specs and target records of one sample; cached specs come from storage."""
        shard = self._shards.get(place.shard)
        key, plan = shard.keys[place.row], self._plan
        data = shard.image_bytes(place.row)
        image = decode_rgb(data, self._max_pixels, telemetry=self._telemetry)
        view, composite = plan.view_index(key, place.epoch), plan.composite_index(key, place.epoch)
        if not self._cached:
            base_spec = plan.base(key, view, _size(image))
            mixed = plan.composite(key, composite, _size(image), self._backgrounds.sizes)
            return key, image, base_spec, mixed, (_NO_RECORD, _NO_RECORD)
        series = (f"view-{view}", f"composite-{composite}")
        parts = [self._targets.get((name, place.shard)) for name in series]
        base_record, mixed_record = (part.records([place.row])[0] for part in parts)
        base_spec = cast(ViewSpec, stored_spec(base_record, "view"))
        mixed = cast(CompositeSpec, stored_spec(mixed_record, "composite"))
        return key, image, base_spec, mixed, (base_record, mixed_record)

    def _noise(self, key: str, epoch: int) -> Sequence[Sequence[float]]:
        kinds = ("base", "composite", *("crop" for _ in range(self._plan.views.crops)))
        return [
            self._plan.photometric(key, epoch, view, BLUR_PROBABILITY[kind])
            for view, kind in enumerate(kinds)
        ]


class _Recent(Generic[K, V]):
    """A thread-safe cache of the most recently used values; each is made once."""

    def __init__(self, size: int, make: Callable[[K], V]) -> None:
        self._size, self._make = size, make
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V:
        with self._lock:
            if key not in self._values:
                self._values[key] = self._make(key)
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


def _size(image: np.ndarray) -> tuple[int, int]:
    return int(image.shape[0]), int(image.shape[1])


def _put(
    ready: "queue.Queue[TrainBatch | BaseException]",
    item: TrainBatch | BaseException,
    stop: threading.Event,
) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
