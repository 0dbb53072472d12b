"""Memory while sharding does not grow with the number of images."""

import subprocess
import sys
from pathlib import Path

import pytest

if not Path("/proc/self/status").exists():
    pytest.skip("peak memory is read from /proc", allow_module_level=True)

# Peak resident memory in MiB after sharding argv[1] made images into argv[2].
CHILD = """
import struct, sys
from test_shard_bytes import grey_png
from data_tools.source import Item
from dpal.base.inputs import Data, Storage
from jobs import build_shards

class Made:
    url = "made"

    def items(self):
        for number in range(int(sys.argv[1])):
            name = f"folder-{number // 1000:05d}/image-{number:09d}.png"
            yield Item(name, name, 100, "1", None, {"identity": str(number // 8)})

    def read(self, picture):
        number = int(picture[-13:-4])
        if number % 50 == 0:
            return b"not an image"
        contents = grey_png(0, 2, 2)
        return contents + struct.pack(">I", number)  # what follows the end of a PNG is ignored

build_shards.open_source = lambda url, data, storage: Made()
policy = Data(images=("made",), min_side=1, samples_per_shard=256, near_duplicates=int(sys.argv[3]),
              max_reject_fraction=1)
manifest = build_shards.build_shards(["made"], sys.argv[2], policy, Storage())
with open("/proc/self/status") as status:  # not ru_maxrss: that is the parent's, if larger
    peak = next(line for line in status if line.startswith("VmHWM"))
print(manifest.num_samples, int(peak.split()[1]) / 1024)
"""


def peak(count: int, dest: Path, near: int) -> tuple[int, float]:
    folder = Path(__file__).parent
    root = folder.parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(count), str(dest), str(near)],
        env={"PYTHONPATH": f"{root}:{folder}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    samples, mib = done.stdout.split()
    return int(samples), float(mib)


def grows_by(tmp_path: Path, few: int, many: int, near: int = 0) -> float:
    samples, small = peak(few, tmp_path / "few", near)
    assert samples == (few - few // 50 if not near else 1)
    samples, large = peak(many, tmp_path / "many", near)
    assert samples == (many - many // 50 if not near else 1)
    assert small < 200
    return large - small


def test_five_times_the_images_need_no_more_memory(tmp_path: Path) -> None:
    assert grows_by(tmp_path, 4_000, 20_000) < 20


@pytest.mark.slow
def test_ten_times_the_images_need_no_more_memory(tmp_path: Path) -> None:
    assert grows_by(tmp_path, 10_000, 100_000) < 20


def test_near_duplicates_in_thousands_need_no_more_memory(tmp_path: Path) -> None:
    assert grows_by(tmp_path, 1_000, 5_000, near=3) < 20
