"""Ray Data: read_webdataset and a decoding map, streamed in batches."""

from collections.abc import Iterator

import numpy as np
import ray
from common import Epoch, Task, decode_stack

DISTRIBUTION = "ray"
SETTINGS = "read_webdataset(shuffle='files'), map_batches decode, iter_batches; workers = CPUs"


def open_epochs(task: Task) -> Epoch:
    """A local Ray of `workers` CPUs (at least 1)."""
    if not ray.is_initialized():
        ray.init(num_cpus=max(task.workers, 1), include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    filesystem = None
    if task.remote:
        from pyarrow.fs import S3FileSystem

        filesystem = S3FileSystem(
            access_key=task.key,
            secret_key=task.secret,
            endpoint_override=task.endpoint,
            region="us-east-1",
        )
    paths = [url.removeprefix("s3://") for url in task.urls()]

    def decoded(batch: dict) -> dict:
        return {"image": decode_stack(list(batch["jpg"]))}

    def epoch(number: int) -> Iterator[np.ndarray]:
        data = ray.data.read_webdataset(paths, filesystem=filesystem, decoder=None, shuffle="files")
        data = data.map_batches(decoded, batch_size=task.batch)
        for batch in data.iter_batches(batch_size=task.batch, prefetch_batches=2):
            yield batch["image"]

    return epoch
