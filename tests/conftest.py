"""Fixtures that more than one area of the tests uses."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_demo import TINY_DEMO, dpal

# One thread per process: several of the tests start processes of their own on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# What is costly to start, and is started once for all tests that use it.
SHARED = {"first_demo": "demo", "s3_server": "s3"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests one worker runs: those of a file, of the cluster's servers, of a shared start."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        group = next((name for fixture, name in SHARED.items() if fixture in fixtures), None)
        if group is None:
            in_cluster = item.path.parent.name == "cluster" and "unit" not in item.path.parts
            group = "cluster" if in_cluster else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


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
