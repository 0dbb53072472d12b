"""torchdata nodes: a sampler of batches, threads that read, decode and stack one batch each.

It has no reader of tars: locally its map reads members by an index, from S3 a node of threads
fetches whole shards.
"""

from collections.abc import Callable, Iterator

import numpy as np
from common import Epoch, Member, Task, decode_rows, image_spans, index, read, s3_get
from torch.utils.data import RandomSampler
from torchdata import nodes

DISTRIBUTION = "torchdata"
SETTINGS = "SamplerWrapper, Batcher, ParallelMapper(thread) of whole batches, Prefetcher(2)"


def open_epochs(task: Task) -> Epoch:
    """Whole batches made by threads."""
    node, read_all = _remote(task) if task.remote else _local(task)
    batches = nodes.ParallelMapper(
        nodes.Batcher(node, task.batch, drop_last=False),
        lambda batch: decode_rows(read_all(batch)),
        task.workers,
        method="thread",
    )
    loader = nodes.Loader(nodes.Prefetcher(batches, 2))

    def epoch(number: int) -> Iterator[np.ndarray]:
        yield from loader

    return epoch


def _local(task: Task) -> tuple[nodes.BaseNode, Callable[[list], list[bytes]]]:
    members: list[Member] = index(task.urls())
    return nodes.SamplerWrapper(RandomSampler(members)), lambda batch: [
        read(members[i]) for i in batch
    ]


def _remote(task: Task) -> tuple[nodes.BaseNode, Callable[[list], list[bytes]]]:
    get = s3_get(task)

    def images(at: int) -> list[bytes]:
        data = get(task.shards[at])
        return [data[offset : offset + size] for offset, size in image_spans(data)]

    shards = nodes.SamplerWrapper(RandomSampler(task.shards))
    fetched = nodes.ParallelMapper(shards, images, min(task.workers, 1), method="thread")
    return nodes.Unbatcher(fetched), list
