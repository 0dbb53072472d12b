"""Fixtures that more than one area of the tests uses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per process: several of the tests start processes of their own on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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


@pytest.fixture(scope="session")
def first_demo(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole pipeline with the demo recipe made tiny: its run folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder / "runs" / "demo", dpal(folder, "demo", *TINY_DEMO)


@pytest.fixture(scope="session")
def finished_demo(first_demo: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    """Run folder of a finished tiny demo; not to be changed."""
    folder, done = first_demo
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, for runs that fill the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
