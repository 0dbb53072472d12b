"""`dpal plan RECIPE --measure FILE`: how fast this machine does what a run consists of.

A run in miniature in a temporary folder, by the parts that real runs are made of: a shard of a few
images, its targets by every teacher, training steps on them. The images are the first of the
recipe's own shards, or drawn persons where there are none. Work of one thread is timed in CPU
seconds, which other programs do not lengthen; accelerators, several threads and the store by the
clock.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data_tools.feature_cache import TargetCache, kind_of, series_of
from data_tools.manifest import ShardRef, manifest_of
from data_tools.shard import read_shard
from data_tools.storage import is_remote, open_store
from data_tools.target_tar import TargetTarBuilder
from dpal.base.config import load_recipe
from dpal.base.errors import EXIT_BUG, DataError, DpalError
from dpal.base.inputs import Storage
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.base.teachers import teacher_name
from dpal.targets.coding import decode_batch, encode_batch
from jobs.caching.batches import Renderer
from jobs.caching.plan import single_teacher_recipes
from jobs.caching.worker import ShardWorker
from jobs.planning.miniature import Miniature, make_miniature, origin_of
from jobs.planning.rates import (
    Loading,
    Node,
    Rates,
    Start,
    Store,
    TeacherRate,
    write_rates,
)
from jobs.planning.student import clock_of, repeated, training

ENOUGH_S = 2.0  # a piece of work is repeated for so long, and three times at least
STORE_BYTES, WRITTEN_BYTES = 256e6, 32e6


def measure_file(recipe_path: str, words: tuple[str, ...], path: Path) -> str:
    """Measure a recipe on this machine and write the rates; returns a line about it.

    Raises:
        ConfigError, DataError, StorageError: what a user can mend.
    """
    recipe = load_recipe(recipe_path, words)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpal-plan-") as folder:
        rates = measure(recipe, Path(folder))
    write_rates(path, rates)
    return f"{path}, measured in {time.monotonic() - begin:.0f} s"


def measure(recipe: Recipe, folder: Path) -> Rates:
    """The rates of this machine for a recipe; everything is written into `folder`."""
    mini = make_miniature(recipe, folder)
    threads = torch.get_num_threads()
    keep_freed_memory()  # as training does
    try:
        return _measured(recipe, mini)
    finally:
        torch.set_num_threads(threads)


def _measured(recipe: Recipe, mini: Miniature) -> Rates:
    workers = [
        ShardWorker(one, threads=mini.teacher_threads, device=mini.device)
        for one in single_teacher_recipes(mini.recipe)
        if mini.recipe.aligned_teachers
    ]
    caches = [_filled(worker) for worker in workers]
    torch.set_num_threads(1)
    loaded = _loading(mini.recipe)
    student, train_start = _student(mini)
    torch.set_num_threads(mini.teacher_threads)
    teachers = tuple(
        _teacher(worker, teacher_name(spec), mini)
        for worker, spec in zip(workers, mini.recipe.aligned_teachers, strict=True)
    )
    read, write = _records(workers[0], caches[0]) if workers else (1e9, 1e9)
    on_cpu = mini.device == "cpu"
    return Rates(
        measured=origin_of(recipe, mini),
        image_bytes=mini.image_bytes,
        student_samples_per_s=student,
        teachers=teachers,
        loading=Loading(
            train_samples_per_s_core=1 / loaded,
            cache_samples_per_s_core=1 / (_rendering(workers[0]) if workers else loaded),
            target_read_gb_per_s_core=read / 1e9,
            target_write_gb_per_s_core=write / 1e9,
        ),
        store=_store(recipe, mini),
        node=Node(
            devices=max(1, torch.cuda.device_count()),
            cores=len(os.sched_getaffinity(0)),
            teacher_cores=mini.teacher_threads if on_cpu else 0,
            student_cores=mini.student_threads if on_cpu else 0,
        ),
        start=Start(train_s=train_start),
    )


def _filled(worker: ShardWorker) -> TargetCache:
    """The finished cache of the miniature."""
    cache = worker.calibrate()
    worker.cache_shard(worker.manifest.shards[0])
    return cache


def _loading(recipe: Recipe) -> float:
    """CPU seconds of a training sample: decoded and rendered by the loader, without targets."""
    with training(recipe, with_targets=False) as (_task, batches):
        next(batches)
        return (
            repeated(lambda: next(batches), time.process_time, ENOUGH_S) / recipe.train.micro_batch
        )


def _student(mini: Miniature) -> tuple[float, float]:
    """Samples per second of training steps on batches that are ready; seconds of starting."""
    path = Path(mini.recipe.output) / "recipe.yaml"
    path.write_text(mini.recipe.to_yaml())
    threads = str(mini.student_threads)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.planning.student", str(path), threads, str(ENOUGH_S)],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        told = lines[-1] if done.returncode > 0 else f"signal {-done.returncode} ended them"
        error = DpalError(f"the student's steps could not be measured: {told}")
        error.exit_code = max(EXIT_BUG, done.returncode)
        raise error
    found = json.loads(done.stdout.splitlines()[-1])
    return found["samples_per_s"], found["start_s"]


def _teacher(worker: ShardWorker, name: str, mini: Miniature) -> TeacherRate:
    """Images per second of one teacher on views and composites that are ready."""
    views = worker.plan.views
    size = min(worker.recipe.teacher.batch_size, mini.recipe.data.samples_per_shard)
    rng = np.random.default_rng(0)

    def rate(height: int, width: int) -> float:
        noise = rng.integers(0, 256, (size, height, width, 3), np.uint8)
        pixels = torch.from_numpy(noise)

        def look() -> None:
            worker.teacher(pixels)
            _finish(mini.device)

        look()
        return size / repeated(look, clock_of(mini.device, mini.teacher_threads), ENOUGH_S)

    return TeacherRate(
        name=name,
        width=worker.teacher.width,
        base_images_per_s=rate(views.height, views.width),
        composite_images_per_s=rate(views.height, views.height),
    )


def _rendering(worker: ShardWorker) -> float:
    """CPU seconds of a sample's decoding and pinned views, as the cache job does them."""
    shard = read_shard(worker.store, worker.manifest.shards[0], None)
    renderer, series = Renderer(worker.recipe, worker.pool, 1), series_of(worker.plan.views)

    def render() -> None:
        for _ in renderer.batches(shard, range(len(shard)), series):
            pass

    return repeated(render, time.process_time, ENOUGH_S) / len(shard)


def _records(worker: ShardWorker, cache: TargetCache) -> tuple[float, float]:
    """Bytes per CPU second of one core: records read and checked, records encoded and packed."""
    torch.set_num_threads(1)
    ref = worker.manifest.shards[0]
    series = series_of(worker.plan.views)
    shards = {name: cache.shard(name, ref) for name in series}
    rows = np.random.default_rng(0).permutation(ref.num_samples).tolist()
    total = sum(len(shard) * shard.layout.num_bytes for shard in shards.values())
    read = repeated(
        lambda: [shard.records(rows) for shard in shards.values()], time.process_time, ENOUGH_S
    )
    work = [_encoding(cache, name, ref) for name in series]
    write = repeated(lambda: [encode() for encode in work], time.process_time, ENOUGH_S)
    return total / read, total / write


def _encoding(cache: TargetCache, name: str, ref: ShardRef) -> Callable[[], bytes]:
    """Encoding and packing the tokens of one series again."""
    shard, kind = cache.shard(name, ref), kind_of(name)
    records = shard.records(range(len(shard)))
    tokens = decode_batch(records, cache.header, kind)
    cls, patches = tokens.cls.numpy(), tokens.patches.numpy()
    specs = np.ascontiguousarray(records[:, : shard.layout.cls_start]).view("<u2")

    def encode() -> bytes:
        tar = TargetTarBuilder(shard.keys, shard.layout)
        tar.fill(0, encode_batch(cls, patches, specs, cache.header, kind))
        return tar.to_bytes()

    return encode


def _store(recipe: Recipe, mini: Miniature) -> Store:
    """Bytes per second of whole shards; writing to a remote store is taken to be as fast."""
    source = recipe
    try:
        manifest = manifest_of(recipe)
    except DataError:  # no shards yet: the folder that they would be in is a guess
        source, manifest = mini.recipe, manifest_of(mini.recipe)
    store = open_store(source.data.shards, source.storage)
    total, data = 0, b""
    begin = time.perf_counter()
    for ref in manifest.shards:
        data = store.get(ref.name)
        total += len(data)
        if total > STORE_BYTES or time.perf_counter() - begin > 3 * ENOUGH_S:
            break
    read = total / (time.perf_counter() - begin) / 1e6
    write = read
    if not is_remote(source.data.shards):
        folder = open_store(str(Path(mini.recipe.output) / "written"), Storage())
        large = (data * (1 + int(WRITTEN_BYTES) // len(data)))[: int(WRITTEN_BYTES)]
        seconds = repeated(lambda: folder.put("object", large), time.perf_counter, ENOUGH_S)
        write = len(large) / seconds / 1e6
    return Store(read_mb_per_s=read, write_mb_per_s=write)


def _finish(device: str) -> None:
    """Wait for the accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()
