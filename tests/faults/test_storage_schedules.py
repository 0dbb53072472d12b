"""Epochs read through a store that fails at random: the exact sequence, or the right error."""

import io
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_tools.loader import Loader, Slice
from data_tools.local_cache import LocalCache
from data_tools.manifest import Manifest, load_manifest
from data_tools.order import Order
from data_tools.remote import RemoteStore
from data_tools.sample import Sample
from data_tools.skips import SkipList
from data_tools.storage import LocalStore, ObjectStore, open_store
from dpal.base.errors import DataError, DpalError, StorageError
from dpal.base.inputs import Data, Storage
from dpal.base.telemetry import STORAGE_REFETCHES, STORAGE_RETRIES, MemoryTelemetry, Metric
from jobs.build_shards import build_shards

from fault_proxy import KINDS, Fault, FaultProxy, Kind, Schedule, faulty_server, proxy
from seaweed import S3Server, s3_server

__all__ = ["faulty_server", "proxy", "s3_server"]

NUM_SHARDS, SHARD_SIZE, BATCH = 12, 8, 8
TIMEOUT_S, RETRIES = 0.25, 2
ALL = Slice(BATCH, BATCH, 0, 1)
SLOW: tuple[Kind, ...] = ("stall", "trickle", "delay")  # each costs a timeout


class Counts(MemoryTelemetry):
    """Sums what several threads report."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def report(self, metric: Metric, value: float, **labels: str) -> None:
        with self._lock:
            super().report(metric, value, **labels)


class Patient:
    """A remote store for one schedule: its end waits for what a stopped loader left under way."""

    def __init__(self, store: RemoteStore) -> None:
        self.url, self._store = store.url, store
        self._under_way, self._ended, self._changed = 0, False, threading.Condition()

    def exists(self, name: str) -> bool:
        return self._store.exists(name)

    def get(self, name: str) -> bytes:
        with self._changed:
            if self._ended:
                raise StorageError("this schedule is over")
            self._under_way += 1
        try:
            return self._store.get(name)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            assert self._changed.wait_for(lambda: not self._under_way, timeout=60)


class Keys(NamedTuple):
    """A batch of which only the keys are kept."""

    keys: tuple[str, ...]


class KeysOnly:
    """Renders nothing, but has every image decoded (a `SampleRenderer`)."""

    def expect(self, _shard: int) -> None:
        pass

    def forget(self) -> None:
        pass

    def start(self, size: int) -> "_Filling":
        return _Filling(size)


class _Filling:
    def __init__(self, size: int) -> None:
        self.keys = [""] * size

    def fill(self, row: int, sample: Sample) -> None:
        assert sample.image.shape == (40, 40, 3)
        self.keys[row] = sample.key

    def finish(self) -> Keys:
        return Keys(tuple(self.keys))


class World(NamedTuple):
    """Where the shards lie, on disk and in the store, and what an undisturbed epoch reads."""

    url: str
    server: S3Server
    epoch: list[str]


@pytest.fixture(scope="module")
def world(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("schedules")
    images = folder / "images"
    images.mkdir()
    for seed in range(NUM_SHARDS * SHARD_SIZE):
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        (images / f"{seed}.jpg").write_bytes(buffer.getvalue())
    policy = Data(images=("unused",), samples_per_shard=SHARD_SIZE)
    build_shards([str(images)], str(folder / "shards"), policy, Storage())
    local, url = LocalStore(folder / "shards"), s3_server.url()
    remote = open_store(url, s3_server.storage())
    manifest = load_manifest(local)
    for name in ["manifest.json", *(ref.name for ref in manifest.shards)]:
        remote.put(name, local.get(name))
    epoch = read_epoch(local, None, folder, Counts())
    assert len(set(epoch)) == NUM_SHARDS * SHARD_SIZE
    return World(url, s3_server, epoch)


def loader_of(
    store: ObjectStore,
    manifest: Manifest,
    copies: LocalCache | None,
    folder: Path,
    telemetry: MemoryTelemetry,
    part: Slice,
) -> Loader:
    sizes = [ref.num_samples for ref in manifest.shards]
    return Loader(
        store,
        manifest,
        Order(7, sizes, global_batch=BATCH, lanes=4, window=2),
        KeysOnly(),
        part,
        skips=SkipList(0, folder / "skipped.jsonl"),
        max_pixels=10_000,
        threads=2,
        prefetch=2,
        copies=copies,
        telemetry=telemetry,
    )


def read_epoch(
    store: ObjectStore | Patient,
    copies: LocalCache | None,
    folder: Path,
    telemetry: MemoryTelemetry,
    start: int = 0,
    part: Slice = ALL,
) -> list[str]:
    """Keys of one rank's first epoch from step `start` on, in their order."""
    manifest = load_manifest(store)
    batches = loader_of(store, manifest, copies, folder, telemetry, part).batches(start)
    try:
        steps = manifest.num_samples // BATCH - start
        return [key for batch in islice(batches, steps) for key in batch.keys]
    finally:
        batches.close()


def drawn_schedule(seed: int) -> Schedule:
    """Faults of the n-th request for each object, as a function of seed, object and n."""
    share = random.Random(seed).choice([0.02, 0.1, 0.25, 0.5])
    counts: dict[str, int] = defaultdict(int)

    def schedule(_number: int, _method: str, path: str) -> Fault:
        counts[path] += 1
        draw = random.Random(f"{seed} {path.rpartition('/')[2]} {counts[path]}")
        if draw.random() >= share:
            return Fault()
        kind = draw.choice([kind for kind in KINDS if kind not in SLOW] * 5 + list(SLOW))
        seconds = {"stall": 3.0, "delay": draw.choice([0.01, 3.0]), "trickle": 0.01}.get(kind, 0.0)
        return Fault(kind, draw.random(), seconds)

    return schedule


def fails(fault: Fault) -> bool:
    """Whether the fault ends a request without a whole body."""
    short = fault.kind == "delay" and fault.seconds < TIMEOUT_S
    return not short and fault.kind not in ("none", "flip")


def faults_of(proxy: FaultProxy) -> dict[str, list[Fault]]:
    """What was done to the requests for every object, by its name."""
    found: dict[str, list[Fault]] = defaultdict(list)
    for request in proxy.requests:
        found[request.path.rpartition("/")[2]].append(request.fault)
    return found


def despaired(faults: Sequence[Fault]) -> bool:
    """Whether the last requests all failed, as many as one fetch makes."""
    last = faults[-RETRIES - 1 :]
    return len(last) == RETRIES + 1 and all(fails(fault) for fault in last)


def named(error: Exception, faults: dict[str, list[Fault]]) -> list[Fault]:
    """The faults of the object that an error names."""
    (name,) = [name for name in faults if f"/{name}" in str(error)]
    return faults[name]


class Outcomes:
    """How many epochs ended how."""

    def __init__(self) -> None:
        self.exact_despite_faults = self.storage = self.data = 0


@pytest.fixture(scope="module")
def counts() -> Counts:
    return Counts()


@pytest.fixture(scope="module")
def store(world: World, proxy: FaultProxy, counts: Counts) -> RemoteStore:
    """One store for all schedules: it is the opening of s3fs that takes most of the time."""
    server = world.server._replace(endpoint=proxy.endpoint)
    storage = server.storage(timeout_s=TIMEOUT_S, retries=RETRIES, min_mb_per_s=10.0)
    return RemoteStore(world.url, storage, telemetry=counts, sleep=shortly)


def shortly(seconds: float) -> None:
    """Wait a fortieth of what would be waited between two attempts."""
    time.sleep(seconds / 40)


def run_schedule(
    world: World,
    store: RemoteStore,
    proxy: FaultProxy,
    counts: Counts,
    seed: int,
    folder: Path,
    seen: Outcomes,
) -> None:
    """Read one epoch, and hold what came out against what was done to the requests."""
    counts.values.clear()
    telemetry = Counts()  # the loader's own
    proxy.set(drawn_schedule(seed))
    patient, copies = Patient(store), LocalCache(folder / str(seed), 10**9)
    try:
        ended: list[str] | DpalError = read_epoch(patient, copies, folder, telemetry)
    except (StorageError, DataError) as error:
        ended = error
    patient.end()
    faults = faults_of(proxy)
    if isinstance(ended, StorageError):
        assert ended.exit_code == 4
        assert despaired(named(ended, faults)), (seed, ended)
        seen.storage += 1
    elif isinstance(ended, DataError):
        assert ended.exit_code == 3
        if not any(fault.kind == "flip" for fault in faults["manifest.json"]):
            kinds = [fault.kind for fault in named(ended, faults)]
            assert kinds.count("flip") == 2, (seed, ended)
            seen.data += 1  # a manifest has no checksum: what it says wrong is met later on
    else:
        assert ended == world.epoch, seed
        seen.exact_despite_faults += check_counts(faults, telemetry, counts) > 0


def check_counts(faults: dict[str, list[Fault]], telemetry: Counts, counts: Counts) -> int:
    """That a finished epoch has fetched every shard and counted every fault; how many."""
    assert not any(despaired(rows) for rows in faults.values())
    shards = [rows for name, rows in faults.items() if name.endswith(".tar")]
    assert len(shards) == NUM_SHARDS
    flipped = sum(fault.kind == "flip" for rows in shards for fault in rows)
    assert telemetry.values.get((STORAGE_REFETCHES.name,), 0) == flipped
    failed = sum(fails(fault) for rows in shards for fault in rows)
    assert counts.values.get((STORAGE_RETRIES.name,), 0) >= failed
    return flipped + failed


@pytest.mark.slow
def test_no_schedule_of_faults_loses_or_repeats_a_sample(
    world: World, store: RemoteStore, proxy: FaultProxy, counts: Counts, tmp_path: Path
) -> None:
    seen = Outcomes()
    for seed in range(200):
        run_schedule(world, store, proxy, counts, seed, tmp_path, seen)
    print(vars(seen))
    assert seen.exact_despite_faults >= 60, vars(seen)
    assert seen.storage >= 10, vars(seen)
    assert seen.data >= 3, vars(seen)


def test_some_schedules_of_faults_are_survived(
    world: World, store: RemoteStore, proxy: FaultProxy, counts: Counts, tmp_path: Path
) -> None:
    seen = Outcomes()
    for seed in range(1000, 1012):
        run_schedule(world, store, proxy, counts, seed, tmp_path, seen)
    assert seen.exact_despite_faults >= 2, vars(seen)


def test_a_resumed_epoch_on_two_ranks_under_faults_is_the_rest_of_the_epoch(
    world: World, proxy: FaultProxy, tmp_path: Path
) -> None:
    faults = (Fault("503"), Fault("truncate", 0.7), Fault("flip"), Fault("reset after"))

    asked: set[str] = set()

    def schedule(_number: int, _method: str, path: str) -> Fault:
        if path in asked or not path.endswith(".tar"):
            return Fault()
        asked.add(path)
        return faults[int(path[-5]) % 4]  # of the shard's number

    proxy.set(schedule)
    server = world.server._replace(endpoint=proxy.endpoint)
    storage = server.storage(timeout_s=2.0, retries=4)
    halves = []
    for rank in range(2):
        store = RemoteStore(world.url, storage, sleep=shortly)
        part, copies = Slice(BATCH, BATCH // 2, rank, 2), LocalCache(tmp_path / "c", 10**9)
        halves.append(read_epoch(store, copies, tmp_path, Counts(), 5, part))
    joined = []
    for step in range(len(world.epoch) // BATCH - 5):
        for half in halves:
            joined += half[step * BATCH // 2 : (step + 1) * BATCH // 2]
    assert joined == world.epoch[5 * BATCH :]
