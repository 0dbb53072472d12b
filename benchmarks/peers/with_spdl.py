"""SPDL: a source of batches (from S3 it fetches whole shards) and a stage that decodes them."""

import random
from collections.abc import Iterator

import numpy as np
from common import Epoch, Member, Task, decode_rows, image_spans, in_batches, index, read, s3_get
from spdl.pipeline import PipelineBuilder

DISTRIBUTION = "spdl"
SETTINGS = "shuffled source of batches, pipe(decode, concurrency=workers, at least 1), add_sink(2)"


def open_epochs(task: Task) -> Epoch:
    """A new pipeline for every epoch."""
    threads = max(task.workers, 1)
    get = s3_get(task)
    members = [] if task.remote else index(task.urls())

    def local(chance: random.Random) -> Iterator[list[Member]]:
        chance.shuffle(members)
        yield from in_batches(members, task.batch)

    def remote(chance: random.Random) -> Iterator[list[bytes]]:
        shards, waiting = list(task.shards), []
        chance.shuffle(shards)
        for name in shards:
            data = get(name)
            waiting += [data[offset : offset + size] for offset, size in image_spans(data)]
            full = len(waiting) // task.batch * task.batch
            yield from in_batches(waiting[:full], task.batch)
            waiting = waiting[full:]
        if waiting:
            yield waiting

    def batch(part: list) -> np.ndarray:
        return decode_rows(part if task.remote else [read(member) for member in part])

    def epoch(number: int) -> Iterator[np.ndarray]:
        source = (remote if task.remote else local)(task.shuffled(number))
        builder = PipelineBuilder().add_source(source)
        builder = builder.pipe(batch, concurrency=threads, output_order="input").add_sink(2)
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    return epoch
