"""The training loader: threads decode and render straight into one batch buffer.

A rank reads its slice of every global batch of the order. A few batches are always under way:
their shards are opened ahead by some threads, their rows are filled in chunks by others. What is
rendered of a sample is a `SampleRenderer`'s business. Where the loader is in the data follows
from the step alone.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, TypeVar

from data_tools.decode import decode_rgb
from data_tools.local_cache import LocalCache
from data_tools.manifest import Manifest
from data_tools.opened import OPENING, Opened, allow_open_files
from data_tools.order import Order, Place
from data_tools.salvage import salvage_shard
from data_tools.sample import BatchBuilder, Pixels, Sample, SampleError, SampleRenderer
from data_tools.shard import DamagedShard, Shard, read_shard
from data_tools.skips import SkipList
from data_tools.storage import ObjectStore
from dpal.base.errors import DataError
from dpal.base.telemetry import Telemetry
from dpal.batch import Batch

T = TypeVar("T")

CHUNK = 16  # rows that a thread fills in one go


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

    def lanes(self, order: Order) -> range:
        """The lanes that this rank's part of every global batch comes from."""
        share = order.lanes // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)


class _UnderWay(NamedTuple):
    """A batch that threads are filling."""

    builder: BatchBuilder
    chunks: Sequence[Future[None]]

    def finish(self) -> Batch:
        for chunk in self.chunks:
            chunk.result()
        return self.builder.finish()


class _Caller(Executor):
    """Does everything at once, in the thread that asks for it."""

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **named))
        except Exception as error:
            done.set_exception(error)
        return done


class Loader:
    """Micro-batches of a run for one rank (a `dpal.batch.BatchSource`).

    Args:
        store: where the image shards lie.
        order: the sequence of all ranks' samples.
        renderer: turns decoded samples into batches.
        part: this rank's part of every global batch.
        skips: the error budget for damaged samples.
        threads: decoding threads; 0 decodes in the caller's, when a batch begins.
        prefetch: micro-batches prepared ahead.
        copies: local copies of shards fetched from remote storage; None keeps them in memory.
        telemetry: told of images that only the slow decoder reads.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: Manifest,
        order: Order,
        renderer: SampleRenderer,
        part: Slice,
        *,
        skips: SkipList,
        max_pixels: int,
        threads: int,
        prefetch: int,
        copies: LocalCache | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.num_samples = manifest.num_samples
        self._order, self._renderer, self._part, self._skips = order, renderer, part, skips
        self._max_pixels, self._telemetry = max_pixels, telemetry
        self._threads, self._prefetch = threads, prefetch

        def open_shard(index: int) -> Shard:
            ref = manifest.shards[index]
            try:
                return read_shard(store, ref, copies, telemetry)
            except DamagedShard:
                if not skips.budget:
                    raise
                return salvage_shard(store, ref)

        allow_open_files()
        at_once = order.shards_at_once(part.world_size)
        self._shards: Opened[int, Shard] = Opened(at_once, open_shard, OPENING)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from `start_step` on, without end; closing the iterator stops the threads.

        Raises:
            DataError: a damaged shard, a key that does not match, or more damaged samples than
                the error budget allows.
            StorageError: storage that cannot be reached.
        """
        under_way: deque[_UnderWay] = deque()
        ahead = _Ahead(self._order, self._part.lanes(self._order))
        pool = ThreadPoolExecutor(self._threads, "decode") if self._threads else _Caller()
        try:
            for step in count(start_step):
                for start in self._part.starts(step):
                    under_way.append(self._begin(start, pool))
                    if len(under_way) > self._prefetch:
                        yield under_way.popleft().finish()
                        for shard in ahead.next(step):
                            self._request(shard)
        finally:
            self._shards.forget_waiting()
            self._renderer.forget()
            pool.shutdown(cancel_futures=True)

    def _begin(self, start: int, pool: Executor) -> _UnderWay:
        places = self._order.places(start, self._part.micro_batch)
        for shard in dict.fromkeys([place.shard for place in places]):
            self._request(shard)
        builder, total = self._renderer.start(len(places)), len(places)
        chunks = [
            pool.submit(self._fill, builder, places, range(first, min(first + CHUNK, total)))
            for first in range(0, total, CHUNK)
        ]
        return _UnderWay(builder, chunks)

    def _request(self, shard: int) -> None:
        self._shards.request(shard)
        self._renderer.expect(shard)

    def _fill(self, builder: BatchBuilder, places: Sequence[Place], rows: range) -> None:
        for row in rows:
            place = places[row]
            shard = self._shards.get(place.shard)
            try:
                builder.fill(row, Sample(shard, place, self._decode))
            except SampleError as error:
                self._skip(builder, row, shard, place, error)

    def _skip(
        self, builder: BatchBuilder, row: int, shard: Shard, place: Place, error: SampleError
    ) -> None:
        """Fill a row with the next sample of the shard that is not damaged."""
        for _ in range(len(shard)):
            following = (place.row + 1) % len(shard)
            key, stand_in = shard.keys[place.row], shard.keys[following]
            self._skips.add(place, shard.ref.name, key, error, stand_in=stand_in)
            place = place._replace(row=following)
            try:
                builder.fill(row, Sample(shard, place, self._decode))
            except SampleError as next_error:
                error = next_error
            else:
                return
        raise DataError(f"shard {shard.ref.name!r} holds damaged samples alone")

    def _decode(self, shard: Shard, row: int, out: Pixels | None) -> Pixels:
        try:
            data = shard.image_bytes(row)
            return decode_rgb(data, self._max_pixels, telemetry=self._telemetry, out=out)
        except DataError as error:
            raise SampleError(str(error)) from None


class _Ahead:
    """The shards that a rank's lanes come to next, a few at a time.

    A batch in work asks for its own shards first; what comes later waits for its turn, so that the
    first batch of a run is not behind a whole window of every lane.
    """

    def __init__(self, order: Order, lanes: Sequence[int]) -> None:
        self._order, self._due_again = order, dict.fromkeys(lanes, 0)
        self._waiting: deque[int] = deque()

    def next(self, step: int) -> Iterator[int]:
        """Shards to open now, at most `OPENING`."""
        turn = step * self._order.global_batch // self._order.lanes
        for lane, until in self._due_again.items():
            if turn >= until:
                shards, self._due_again[lane] = self._order.due(lane, turn)
                self._waiting.extend(shards)
        for _ in range(min(OPENING, len(self._waiting))):
            yield self._waiting.popleft()
