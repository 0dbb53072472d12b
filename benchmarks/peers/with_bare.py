"""The limit: a tar index, pread and simplejpeg into one batch buffer, in file order.

Without workers a plain loop; with workers, threads that each fill a whole batch. From S3 one
thread fetches the next shard while this one is decoded. It checks nothing and shuffles nothing.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import simplejpeg
from common import Epoch, Task, image_spans, in_batches, index, read, s3_get

DISTRIBUTION = "simplejpeg"
SETTINGS = "plain loop (0) or one batch per thread; file order; next shard fetched ahead from S3"


def open_epochs(task: Task) -> Epoch:
    """Batches in file order."""
    shape = (task.height, task.width, 3)
    buffers = [np.empty((task.batch, *shape), np.uint8) for _ in range(task.workers + 2)]

    def fill(buffer: np.ndarray, images: Sequence[bytes]) -> np.ndarray:
        for row, data in zip(buffer, images, strict=False):
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=row)
        return buffer[: len(images)]

    def fill_local(buffer: np.ndarray, members: Sequence) -> np.ndarray:
        for row, member in zip(buffer, members, strict=False):
            simplejpeg.decode_jpeg(read(member), colorspace="RGB", buffer=row)
        return buffer[: len(members)]

    def epoch(number: int) -> Iterator[np.ndarray]:
        parts, work = (remote(), fill) if task.remote else (local(), fill_local)
        if not task.workers:
            yield from (work(buffers[0], part) for part in parts)
            return
        with ThreadPoolExecutor(task.workers) as pool:
            running = []
            for turn, part in enumerate(parts):
                if len(running) > task.workers:
                    yield running.pop(0).result()
                running.append(pool.submit(work, buffers[turn % len(buffers)], part))
            yield from (job.result() for job in running)

    def local() -> Iterator[Sequence]:
        return chain.from_iterable([in_batches(members, task.batch)])

    def remote() -> Iterator[list[bytes]]:
        get, waiting = s3_get(task), []
        with ThreadPoolExecutor(1) as fetcher:
            ahead = fetcher.submit(get, task.shards[0])
            for following in (*task.shards[1:], None):
                data = ahead.result()
                if following is not None:
                    ahead = fetcher.submit(get, following)
                for offset, size in image_spans(data):
                    waiting.append(data[offset : offset + size])
                    if len(waiting) == task.batch:
                        yield waiting
                        waiting = []
        if waiting:
            yield waiting

    members = [] if task.remote else index(task.urls())
    return epoch
