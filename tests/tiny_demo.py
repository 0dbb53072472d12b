"""The demo recipe made tiny, and the `dpal` command as a user starts it."""

import subprocess
import sys
from pathlib import Path

TINY_DEMO = (
    "data.synthetic={identities: 8, images_per_identity: 6, held_out_identities: 6}",
    "data.samples_per_shard=16",
    "teacher={kind: taught, width: 96, depth: 2, steps: 6, global_batch: 8, batch_size: 8}",
    "cache.calibration_images=32",
    "train.duration=4 steps",
    "train.warmup=1 steps",
    "train.global_batch=8",
    "train.micro_batch=8",
    "train.checkpoint_every=2",
    "train.log_every=1",
)


def dpal(folder: Path, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the `dpal` command in `folder`."""
    command = [sys.executable, "-m", "jobs", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout
    )
