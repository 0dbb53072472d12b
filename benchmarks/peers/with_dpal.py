"""Ours: the training loader, with a renderer that takes whole images and nothing else."""

import shutil
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from common import Epoch, Task

from data_tools.loader import Loader, Slice
from data_tools.local_cache import LocalCache
from data_tools.manifest import load_manifest
from data_tools.order import Order
from data_tools.sample import Sample
from data_tools.skips import SkipList
from data_tools.storage import open_store
from dpal.base.inputs import Storage
from dpal.base.recipe import Train

DISTRIBUTION = "dpal"
SETTINGS = "a recipe's lanes and window, `workers` decoding threads, prefetch 2, shards verified"
LANES, WINDOW = (Train.model_fields[name].default for name in ("lanes", "window"))
PREFETCH = 2
CACHE_BYTES, MAX_PIXELS = 1 << 34, 1 << 24


class WholeImages:
    """Batches of decoded images in buffers that are used again and again: uint8 [B, H, W, 3]."""

    def __init__(self, task: Task, buffers: int) -> None:
        shape = (task.batch, task.height, task.width, 3)
        self._buffers = [np.empty(shape, np.uint8) for _ in range(buffers)]
        self._turn = 0

    def expect(self, shard: int) -> None:
        """Nothing is joined to the images."""

    def forget(self) -> None:
        """So nothing is waited for."""

    def start(self, size: int) -> "WholeBatch":
        """The next buffer."""
        self._turn = (self._turn + 1) % len(self._buffers)
        return WholeBatch(self._buffers[self._turn][:size])


class WholeBatch:
    """A batch that is being filled."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def fill(self, row: int, sample: Sample) -> None:
        """Decode straight into the row."""
        sample.decode_into(self.images[row])

    def finish(self) -> np.ndarray:
        """uint8 [B, H, W, 3]."""
        return self.images


def open_epochs(task: Task) -> Epoch:
    """One loader for all epochs, as a run has it; from S3 a new one each, without its copies."""
    begin_at = open_loader(task)
    steps, rest = divmod(task.images, task.batch)
    if rest:
        raise ValueError(f"{task.images} images are not a multiple of batches of {task.batch}")
    running: list[Generator[np.ndarray]] = []

    def epoch(number: int) -> Iterator[np.ndarray]:
        if task.remote or not running:
            running[:] = [begin_at(number * steps)]
        yield from islice(running[0], steps)
        if task.remote:
            running.pop().close()
            shutil.rmtree(Path(task.scratch) / "copies")

    return epoch


def open_loader(task: Task) -> Callable[[int], Generator[np.ndarray]]:
    """A function from a step to the endless batches of a new loader that begins there."""
    storage = Storage()
    if task.remote:
        storage = Storage(endpoint_url=task.endpoint, key=task.key, secret=task.secret)
    url = f"s3://{task.bucket}" if task.remote else task.folder
    store = open_store(url, storage)
    manifest = load_manifest(store)
    sizes = tuple(ref.num_samples for ref in manifest.shards)
    scratch = Path(task.scratch)

    def begin_at(step: int) -> Generator[np.ndarray]:
        loader = Loader(
            store,
            manifest,
            Order(task.seed, sizes, global_batch=task.batch, lanes=LANES, window=WINDOW),
            WholeImages(task, PREFETCH + 2),
            Slice(task.batch, task.batch, 0, 1),
            skips=SkipList(0, scratch / "skipped.jsonl"),
            max_pixels=MAX_PIXELS,
            threads=task.workers,
            prefetch=PREFETCH,
            copies=LocalCache(scratch / "copies", CACHE_BYTES) if task.remote else None,
        )
        return loader.batches(step)

    return begin_at
