"""Sharding killed at random moments by SIGKILL and run again: same bytes, no slice judged twice."""

import csv
import io
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
SLICE = 16

# Shards persons.csv in argv[1] into argv[2], slowly; argv[3] gets a line for each picture that is
# judged, and one for each slice whose verdicts are stored.
CHILD = f"""
import os, sys, time
from data_tools import ingest
from data_tools.storage import LocalStore
from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

log = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
judge, put = ingest.judge, LocalStore.put

def slow_judge(contents, items, *rest):
    os.write(log, b"".join(b"judged %s\\n" % item.name.encode() for item in items))
    time.sleep(0.002)
    return judge(contents, items, *rest)

def slow_put(self, name, data):
    time.sleep(0.01)
    put(self, name, data)
    if name.startswith("scan/"):
        os.write(log, b"stored\\n")
    time.sleep(0.01)

ingest.SLICE, ingest.judge, LocalStore.put = {SLICE}, slow_judge, slow_put
policy = Data(images=("persons.csv",), samples_per_shard=24, near_duplicates=1,
              validation_fraction=0.3)
print("go", flush=True)
build_shards([sys.argv[1] + "/persons.csv"], sys.argv[2], policy, Storage())
"""


def write_table(folder: Path) -> None:
    """Pictures of two persons each, of 20 identities; some pictures twice, some damaged."""
    rows: list[list[object]] = []
    folder.mkdir()
    for number in range(90):
        coarse = np.random.default_rng(number % 80).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((96, 60), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        contents = buffer.getvalue() if number % 30 else b"damaged"
        (folder / f"{number:03d}.jpg").write_bytes(contents)
        for left in (2, 50):
            rows.append([f"{number:03d}.jpg", left, 5, left + 40, 55, f"id{number % 20}"])
    with (folder / "persons.csv").open("w", newline="") as file:
        names = ["file", "left", "top", "right", "bottom", "identity"]
        csv.writer(file).writerows([names, *rows])


def start(source: Path, dest: Path, log: Path) -> subprocess.Popen[str]:
    """The child, once it is about to begin."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(dest), str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    return child


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def stored_before(log: str) -> tuple[set[str], list[str]]:
    """Items whose verdicts are stored, and items judged again although they were."""
    stored: set[str] = set()
    again: list[str] = []
    pending: list[str] = []
    for line in log.splitlines():
        if line == "died":
            pending = []
        elif line == "stored":
            stored |= set(pending)
            pending = []
        else:
            name = line.removeprefix("judged ")
            pending.append(name)
            again += [name] if name in stored else []
    return stored, again


def test_killed_at_random_moments_and_run_again(tmp_path: Path) -> None:
    source, dest, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    write_table(source)
    began = time.monotonic()
    assert start(source, tmp_path / "whole", tmp_path / "whole.log").wait() == 0
    seconds = time.monotonic() - began
    rng, killed = random.Random(0), 0
    for _attempt in range(40):
        child = start(source, dest, log)
        try:
            child.wait(rng.uniform(0.02, 0.4) * seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            killed += 1
        child.wait()
        with log.open("a") as file:
            file.write("died\n")
        if child.returncode == 0 and killed < 6:  # done too soon: kill earlier, from the beginning
            shutil.rmtree(dest)
            log.unlink()
            killed, seconds = 0, 0.8 * seconds
        if killed == 8:
            break
    assert killed >= 6
    assert start(source, dest, log).wait() == 0
    assert contents(dest) == contents(tmp_path / "whole")
    assert any(name.endswith(".tar") for name in contents(dest / "validation"))
    stored, again = stored_before(log.read_text())
    assert len(stored) >= 5 * SLICE
    assert again == []
    lines = log.read_text().count("judged")
    before = {path: path.stat().st_ino for path in dest.rglob("*")}
    assert start(source, dest, log).wait() == 0
    assert {path: path.stat().st_ino for path in dest.rglob("*")} == before
    assert log.read_text().count("judged") == lines
