"""litdata: its own chunks of encoded images, decoded in `__getitem__`, its StreamingDataLoader."""

from collections.abc import Iterator
from pathlib import Path

import litdata
import numpy as np
import torch
from common import Epoch, Task, decode, image_spans
from litdata.streaming import downloader

DISTRIBUTION = "litdata"
SETTINGS = "chunks of 64 MB written by optimize(), shuffle=True, StreamingDataLoader processes"
CONVERTS = True
CACHES = True


class Images(litdata.StreamingDataset):
    """Decodes what the chunks hold."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(decode(super().__getitem__(index)))


def encoded_images(path: str) -> Iterator[bytes]:
    """Every image of a shard."""
    data = Path(path).read_bytes()
    yield from (data[offset : offset + size] for offset, size in image_spans(data))


def convert(task: Task) -> None:
    """Write the images of the shards as chunks."""
    litdata.optimize(
        fn=encoded_images,
        inputs=task.urls(),
        output_dir=str(Path(task.folder) / "litdata"),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def open_epochs(task: Task) -> Epoch:
    """The loader is kept over epochs."""
    where = f"s3://{task.bucket}/litdata" if task.remote else str(Path(task.folder) / "litdata")
    options = {}
    if task.remote:
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # no option of its own for that
        options = {
            "endpoint_url": task.endpoint,
            "aws_access_key_id": task.key,
            "aws_secret_access_key": task.secret,
        }
    data = Images(where, cache_dir=task.scratch, shuffle=True, storage_options=options)
    loader = litdata.StreamingDataLoader(
        data,
        batch_size=task.batch,
        num_workers=task.workers,
        persistent_workers=task.workers > 0,
        drop_last=False,
    )

    def epoch(number: int) -> Iterator[np.ndarray]:
        for batch in loader:
            yield batch.numpy()

    return epoch
