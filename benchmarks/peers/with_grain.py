"""grain: a shuffled map-style data set whose batches are made by reading threads."""

from collections.abc import Iterator

import grain
import numpy as np
from common import Epoch, Task, decode, index, read

DISTRIBUTION = "grain"
SETTINGS = "MapDataset.shuffle.map.batch, ReadOptions(num_threads=workers)"


def open_epochs(task: Task) -> Epoch:
    """A global shuffle with a new seed for every epoch."""
    if task.remote:
        raise NotImplementedError("grain has no reader of tars or objects in S3")
    members = index(task.urls())

    def epoch(number: int) -> Iterator[np.ndarray]:
        data = grain.MapDataset.source(members).seed(task.seed + number).shuffle()
        batches = data.map(lambda member: decode(read(member))).batch(task.batch)
        options = grain.ReadOptions(num_threads=task.workers, prefetch_buffer_size=task.workers + 2)
        yield from batches.to_iter_dataset(options)

    return epoch
