"""Megatron-Energon: the shards with its index beside them, a train data set, its loader."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import yaml
from common import Epoch, Task, decode
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)

DISTRIBUTION = "megatron-energon"
SETTINGS = "crude samples, shuffle_buffer_size=100, max_samples_per_sequence=100, processes"
CONVERTS = True


@edataclass
class Picture(Sample):
    """One decoded image, uint8 [H, W, 3]."""

    image: torch.Tensor


@stateless
def cook(sample: CrudeSample) -> Picture:
    """The one decoder of this race."""
    return Picture(**basic_sample_keys(sample), image=torch.from_numpy(decode(sample["jpg"])))


class Pictures(DefaultTaskEncoder):
    """Decodes raw samples; batches are stacked by the base class."""

    decoder = None
    cookers: ClassVar = [Cooker(cook)]


def convert(task: Task) -> None:
    """Index the shards in place (`.nv-meta`)."""
    command = [
        *(str(Path(sys.executable).with_name("energon")), "prepare", task.folder),
        *("--non-interactive", "--no-progress", "--force-overwrite", "--num-workers", "1"),
        *("--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"),
    ]
    subprocess.run(command, check=True)


def open_epochs(task: Task) -> Epoch:
    """One pass over the train data set per epoch."""
    path = task.folder
    if task.remote:
        path = _profile(task)
    config = WorkerConfig(rank=0, world_size=1, num_workers=task.workers, seed_offset=task.seed)
    data = get_train_dataset(
        path,
        worker_config=config,
        batch_size=task.batch,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Pictures(),
        repeat=False,
    )
    loader = get_loader(data)

    def epoch(number: int) -> Iterator[np.ndarray]:
        for batch in loader:
            yield batch.image.numpy()

    return epoch


def _profile(task: Task) -> str:
    """A profile of multi-storage-client that reaches the task's server."""
    profile = {
        "storage_provider": {
            "type": "s3",
            "options": {
                "base_path": task.bucket,
                "endpoint_url": task.endpoint,
                "region_name": "us-east-1",
            },
        },
        "credentials_provider": {
            "type": "S3Credentials",
            "options": {"access_key": task.key, "secret_key": task.secret},
        },
    }
    file = Path(task.scratch) / "msc.yaml"
    file.write_text(yaml.safe_dump({"profiles": {"race": profile}}))
    os.environ["MSC_CONFIG"] = str(file)
    return "msc://race/"
