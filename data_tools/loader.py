"""The training loader: threads decode and render straight into one batch buffer.

A rank reads its slice of every global batch of the order and keeps a few batches ready; what is
rendered of a sample is a `SampleRenderer`'s business. Where it is in the data follows from the
step alone.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from data_tools.composites import Neighbours
from data_tools.decode import decode_rgb
from data_tools.manifest import Manifest
from data_tools.order import WINDOW_SHARDS, Order, Place
from data_tools.shard import Shard, read_shard
from data_tools.storage import ObjectStore
from dpal.base.telemetry import Telemetry
from dpal.batch import Batch

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


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


class Sample(NamedTuple):
    """One decoded image on its way into a batch.

    Attributes:
        key: sample key.
        image: uint8 [H, W, 3].
        place: shard, row and epoch in the order.
        neighbours: the other samples of its shard; None when they are out of reach.
    """

    key: str
    image: np.ndarray
    place: Place
    neighbours: Neighbours | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


class BatchBuilder(Protocol):
    """A batch that is being filled, row by row, from several threads."""

    def fill(self, row: int, sample: Sample) -> None:
        """Render every view of one sample into its row."""
        ...

    def finish(self) -> Batch:
        """The batch, after every row was filled."""
        ...


class SampleRenderer(Protocol):
    """What a method sees of a sample; the loader knows nothing else of it."""

    def start(self, size: int) -> BatchBuilder:
        """Begin a batch of `size` samples."""
        ...


class Loader:
    """Micro-batches of a run for one rank (a `dpal.batch.BatchSource`).

    Args:
        store: where the image shards lie.
        seed: of the order.
        renderer: turns decoded samples into batches.
        part: this rank's part of every global batch.
        threads: decoding threads.
        prefetch: micro-batches prepared ahead.
        cache_dir: local folder for shards fetched from remote storage.
        telemetry: told of images that only the slow decoder reads.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        seed: int,
        renderer: SampleRenderer,
        part: Slice,
        *,
        max_pixels: int,
        threads: int,
        prefetch: int,
        cache_dir: Path,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.num_samples = manifest.num_samples
        self._order = Order(seed, tuple(ref.num_samples for ref in manifest.shards))
        self._renderer, self._part, self._max_pixels = renderer, part, max_pixels
        self._threads, self._prefetch, self._telemetry = threads, prefetch, telemetry
        refs = manifest.shards
        self._shards: Recent[int, Shard] = Recent(
            2 * WINDOW_SHARDS, lambda i: read_shard(store, refs[i], cache_dir)
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from `start_step` on, without end; closing the iterator stops the threads.

        Raises:
            DataError: a damaged shard, sample or target, or a key that does not match.
            StorageError: storage that cannot be reached.
        """
        ready: queue.Queue[Batch | BaseException] = queue.Queue(self._prefetch)
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
        ready: "queue.Queue[Batch | BaseException]",
        stop: threading.Event,
    ) -> None:
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            for step in count(start_step):
                for start in self._part.starts(step):
                    item: Batch | BaseException
                    try:
                        item = self._batch(start, pool)
                    except BaseException as error:
                        item = error
                    if not _put(ready, item, stop) or isinstance(item, BaseException):
                        return

    def _batch(self, start: int, pool: ThreadPoolExecutor) -> Batch:
        """One micro-batch: every sample is decoded and rendered by some thread into its row."""
        places = list(self._order.places(start, self._part.micro_batch))
        batch = self._renderer.start(len(places))

        def fill(row: int) -> None:
            place = places[row]
            shard = self._shards.get(place.shard)

            def read(other: int) -> tuple[str, np.ndarray]:
                data = shard.image_bytes(other)
                image = decode_rgb(data, self._max_pixels, telemetry=self._telemetry)
                return shard.keys[other], image

            key, image = read(place.row)
            neighbours = Neighbours(place.row, len(shard), read)
            batch.fill(row, Sample(key, image, place, neighbours))

        for _ in pool.map(fill, range(len(places))):
            pass
        return batch.finish()


class Recent(Generic[K, V]):
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


def _put(
    ready: "queue.Queue[Batch | BaseException]",
    item: Batch | BaseException,
    stop: threading.Event,
) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
