"""Bytes only: a tar index and pread, or whole objects from S3; nothing is decoded."""

from collections.abc import Iterator

from common import Epoch, Task, image_spans, in_batches, index, read, s3_get

DISTRIBUTION = ""
SETTINGS = "reads every image's bytes in file order, decodes nothing"
READS_ONLY = True


def open_epochs(task: Task) -> Epoch:
    """The encoded images, in batches."""
    get = s3_get(task) if task.remote else None

    def epoch(number: int) -> Iterator[list[bytes]]:
        if get is None:
            for part in in_batches(index(task.urls()), task.batch):
                yield [read(member) for member in part]
            return
        for name in task.shards:
            data = get(name)
            yield [data[offset : offset + size] for offset, size in image_spans(data)]

    return epoch
