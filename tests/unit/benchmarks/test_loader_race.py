"""The loaders' race: its images, its processes, its sums, and our own contestant."""

import importlib
import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.manifest import load_manifest
from data_tools.shard import read_shard
from data_tools.storage import LocalStore

FOLDER = Path(__file__).parents[3] / "benchmarks"
IMAGES, PER_SHARD = 128, 50


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("bench_peers")


@pytest.fixture(scope="module")
def course(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("race")
    manifest = script.write_shards(folder, script.jpegs(IMAGES), PER_SHARD)
    names, truth = [ref.name for ref in manifest.shards], script.truth_of(folder)
    return script.Course(folder, names, truth, Path(sys.executable), ("bare", "dpal"))


def _encoded(folder: Path) -> list[bytes]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
            found += [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    return found


def test_drawn_images_differ_and_are_as_heavy_as_photographs(course: Any) -> None:
    images = _encoded(course.folder)
    assert len(images) == len(set(images)) == IMAGES
    assert 8_000 < np.mean([len(data) for data in images]) < 11_000
    assert {Image.open(io.BytesIO(data)).size for data in images} == {(128, 256)}


def test_made_shards_are_shards_of_ours(course: Any) -> None:
    store = LocalStore(course.folder)
    shards = [read_shard(store, ref, None) for ref in load_manifest(store).shards]
    assert sorted(s.image_bytes(i) for s in shards for i in range(len(s))) == sorted(
        _encoded(course.folder)
    )


def test_a_missing_or_repeated_image_changes_the_digest(script: ModuleType) -> None:
    sums = [3, 1, 2, 2]
    assert script.pixels_digest(sums) == script.pixels_digest([2, 1, 2, 3])
    assert script.pixels_digest(sums) != script.pixels_digest([3, 1, 2])
    assert script.pixels_digest(sums) != script.pixels_digest([3, 1, 2, 3])


@pytest.mark.parametrize("workers", [0, 2])
def test_ours_and_the_limit_deliver_every_image_once_and_equal(
    script: ModuleType, course: Any, workers: int, tmp_path: Path
) -> None:
    entries = script.race(course, workers, 1, tmp_path)
    assert [(entry.name, entry.error, entry.whole) for entry in entries] == [
        ("bare", "", True),
        ("dpal", "", True),
    ]
    for entry in entries:
        assert entry.laps[0].images == IMAGES
        assert entry.laps[0].num_bytes == IMAGES * 256 * 128 * 3
        assert entry.laps[0].wall >= entry.laps[0].first > 0
        assert entry.laps[0].cpu > 0


def test_who_cannot_run_is_out_with_the_reason_and_the_race_goes_on(
    script: ModuleType, course: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    course = script.replace(course, names=("nobody", "bare"))
    out, bare = script.race(course, 0, 1, tmp_path)
    script.report("local, 0 workers", [out, bare], course.truth)
    assert "ModuleNotFoundError" in out.error
    assert bare.laps
    text = capsys.readouterr().out
    assert "nobody: out, open: ModuleNotFoundError: No module named 'with_nobody'" in text


def test_the_seconds_of_workers_are_counted_and_none_is_left(
    script: ModuleType, course: Any, tmp_path: Path
) -> None:
    """The mark is inherited: a process started by a contestant's process is found and ended."""
    contestant = course.start("bare", 0, tmp_path / "bare")
    contestant.tell("open")
    name, value = contestant._mark.split("=")
    busy = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"
    with subprocess.Popen([sys.executable, "-c", busy + "time.sleep(60)"], env={name: value}) as it:
        before = contestant.cpu_seconds()
        deadline = time.monotonic() + 30
        while contestant.cpu_seconds() - before < 0.4 and time.monotonic() < deadline:
            time.sleep(0.05)
        counted = contestant.cpu_seconds() - before
        contestant.stop()
        assert it.wait(10) < 0
    assert counted >= 0.4


def test_ratios_are_taken_within_a_round(script: ModuleType) -> None:
    def entry(*walls: float) -> Any:
        return script.Entry("", laps=[script.Lap(1, 1, wall, wall, 0.0) for wall in walls])

    slow_machine_later = entry(1.0, 2.0, 8.0), entry(2.0, 4.0, 16.0)
    assert slow_machine_later[0].ahead_of(slow_machine_later[1], "wall") == 2.0
    assert slow_machine_later[0].median("wall") == 2.0


def test_every_contestant_has_a_file_and_a_pinned_distribution(script: ModuleType) -> None:
    peers = FOLDER / "peers"
    pins = {
        line.partition("==")[0].partition("[")[0]
        for line in (peers / "requirements.txt").read_text().splitlines()
        if "==" in line
    }
    for name in script.PEERS:
        text = (peers / f"with_{name}.py").read_text()
        distribution = text.partition('DISTRIBUTION = "')[2].partition('"')[0]
        assert distribution in pins
        assert "SETTINGS = " in text
