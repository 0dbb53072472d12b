"""mosaicml-streaming: MDS shards of encoded images, torch's DataLoader for workers."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import Epoch, Task, decode, index, read

DISTRIBUTION = "mosaicml-streaming"
SETTINGS = "MDS shards of 64 MB, shuffle=True (its default py1e), DataLoader processes"
CONVERTS = True
CACHES = True


def convert(task: Task) -> None:
    """Write the images of the shards as MDS."""
    _let_torchvision_import()
    from streaming import MDSWriter

    out = str(Path(task.folder) / "mosaicml")
    with MDSWriter(out=out, columns={"image": "bytes"}, size_limit=1 << 26) as writer:
        for member in index(task.urls()):
            writer.write({"image": read(member)})


def open_epochs(task: Task) -> Epoch:
    """The loader is kept over epochs, as its own epoch counter wants."""
    _let_torchvision_import()
    from streaming import StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> torch.Tensor:
            return torch.from_numpy(decode(super().__getitem__(at)["image"]))

    if task.remote:
        os.environ["S3_ENDPOINT_URL"] = task.endpoint
        os.environ["AWS_ACCESS_KEY_ID"] = task.key
        os.environ["AWS_SECRET_ACCESS_KEY"] = task.secret
        remote, local = f"s3://{task.bucket}/mosaicml", task.scratch
    else:
        remote, local = None, str(Path(task.folder) / "mosaicml")
    data = Images(remote=remote, local=local, shuffle=True, batch_size=task.batch)
    loader = torch.utils.data.DataLoader(
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


def _let_torchvision_import() -> None:
    """Declare two operators where torchvision's own library does not fit a CPU build of torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)


_keep: list[object] = []
