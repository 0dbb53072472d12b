"""webdataset: shuffled shards, a shuffle buffer of encoded samples, its WebLoader for workers."""

from collections.abc import Iterator

import numpy as np
import torch
import webdataset as wds
from common import Epoch, Task, decode, s3_filesystem
from webdataset.gopen import gopen_schemes

DISTRIBUTION = "webdataset"
SETTINGS = "shardshuffle, .shuffle(1000) before decoding, .batched, WebLoader processes"


def open_epochs(task: Task) -> Epoch:
    """Batches as torch tensors, as its documentation advises, seen as arrays."""
    if task.remote:
        gopen_schemes["s3"] = lambda url, mode="rb", *_, **__: s3_filesystem(task).open(url, mode)
    data = (
        wds.WebDataset(
            task.urls(),
            shardshuffle=len(task.shards),
            nodesplitter=wds.single_node_only,
            workersplitter=wds.split_by_worker,
            empty_check=False,
        )
        .shuffle(1000)
        .map(lambda sample: decode(sample["jpg"]))
        .batched(task.batch, collation_fn=lambda images: torch.from_numpy(np.stack(images)))
    )
    loader = wds.WebLoader(
        data, batch_size=None, num_workers=task.workers, persistent_workers=task.workers > 0
    )

    def epoch(number: int) -> Iterator[np.ndarray]:
        for batch in loader:
            yield batch.numpy()

    return epoch
