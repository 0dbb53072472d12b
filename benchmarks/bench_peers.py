"""The training loader against other loaders: same images, same decoder, whole shuffled epochs.

    make bench-loader                                        (installs the peers on their own)
    python benchmarks/bench_peers.py --peers-python PYTHON [--images 6400] [--rounds 3]

Every contestant runs in a process of its own and takes turns with the others, epoch by epoch.
Before that an epoch is checked: each image exactly once, every pixel as simplejpeg decodes it.
"bare" is the limit: a tar index, pread and simplejpeg in a loop, in file order, unchecked.
Where a peer lets its user make a whole batch in one call, that call decodes straight into the rows
of a new batch, as ours does. Fails (exit 1) only when ours does.
"""

import argparse
import contextlib
import json
import secrets
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from contestants import Contestant, Failed, Lap
from loader_data import SIZE, Truth, jpegs, pixels_digest, truth_of, write_shards
from timing import table

BATCH = 64
PER_SHARD = 250
OURS, LIMIT, SCAN = "dpal", "bare", "scan"
PEERS = (
    *("webdataset", "torchdata", "spdl", "grain"),
    *("litdata", "mosaicml", "energon", "ray"),
)
CONVERTING = ("litdata", "mosaicml", "energon")
NO_WORKERS = {SCAN: (0,)}  # reads alone, whatever the number of workers


@dataclass
class Entry:
    """A contestant in one race: what it has shown so far, or why it could not.

    Attributes:
        name: of its file.
        process: while it runs.
        whole: whether the checked epoch held every image once, pixels equal; None if unchecked.
    """

    name: str
    process: Contestant | None = None
    laps: list[Lap] = field(default_factory=list)
    whole: bool | None = None
    version: str = ""
    settings: str = ""
    caches: bool = False
    error: str = ""

    def median(self, of: str) -> float:
        """Median over rounds of `wall`, `cpu` or `first`."""
        return statistics.median(getattr(lap, of) for lap in self.laps)

    def ahead_of(self, other: "Entry", clock: str) -> float:
        """Median over rounds of the other's time / this one's in the same round."""
        pairs = zip(self.laps, other.laps, strict=False)
        return statistics.median(
            getattr(theirs, clock) / max(getattr(mine, clock), 0.01) for mine, theirs in pairs
        )


@dataclass(frozen=True)
class Course:
    """What is raced over: where the images lie, how many there are, who can run."""

    folder: Path
    shards: Sequence[str]
    truth: Truth
    python: Path
    names: Sequence[str]
    bucket: str = ""
    endpoint: str = ""
    key: str = ""
    secret: str = ""

    def task(self, workers: int, scratch: Path) -> dict[str, Any]:
        """The fields of `peers.common.Task`."""
        return {
            "shards": list(self.shards),
            "folder": str(self.folder),
            "bucket": self.bucket,
            "endpoint": self.endpoint,
            "key": self.key,
            "secret": self.secret,
            "images": self.truth.images,
            "batch": BATCH,
            "height": SIZE[0],
            "width": SIZE[1],
            "workers": workers,
            "scratch": str(scratch),
        }

    def start(self, name: str, workers: int, scratch: Path) -> Contestant:
        """A contestant's process."""
        scratch.mkdir(parents=True)
        python = Path(sys.executable) if name == OURS else self.python
        task = self.task(workers, scratch / "data")
        return Contestant(python, name, task, scratch / "log")


def race(course: Course, workers: int, rounds: int, scratch: Path) -> list[Entry]:
    """All contestants with one number of workers, epoch by epoch in turns."""
    entries = [Entry(name) for name in course.names if workers in NO_WORKERS.get(name, (workers,))]
    try:
        for entry in entries:
            with _or_out(entry):
                place = scratch / secrets.token_hex(2)
                entry.process = course.start(entry.name, workers, place)
                opened = entry.process.tell("open")
                entry.version, entry.settings = opened["version"], opened["settings"]
                entry.caches = opened["caches"]
                if entry.name != SCAN:
                    sums = entry.process.tell("check", number=0)["sums"]
                    entry.whole = pixels_digest(sums) == course.truth.pixels
        for number in range(1, rounds + 1):
            for entry in entries:
                if entry.process is None:
                    continue
                with _or_out(entry):
                    if course.bucket and entry.caches:
                        entry.process.tell("open")  # with an empty cache
                    entry.laps.append(entry.process.lap(number))
    finally:
        for entry in entries:
            if entry.process is not None:
                entry.process.stop()
    return entries


@contextlib.contextmanager
def _or_out(entry: Entry) -> Iterator[None]:
    """Who fails is out, with the reason."""
    try:
        yield
    except Failed as error:
        entry.error = str(error)
        if entry.process is not None:
            entry.process.stop()
            entry.process = None
        entry.laps.clear()


def report(title: str, entries: list[Entry], truth: Truth) -> None:
    """Print one race as a table, the fastest first; who is out comes last, with the reason."""
    ours = next((entry for entry in entries if entry.name == OURS and entry.laps), None)
    ranked = sorted((e for e in entries if e.laps), key=lambda entry: entry.median("wall"))
    rows = []
    for entry in ranked:
        images, wall = entry.laps[0].images, entry.median("wall")
        per_image = truth.jpeg_bytes / truth.images / 1e6
        rows.append(
            (
                f"{entry.name} {entry.version}".strip(),
                images / wall,
                images / wall * per_image,
                images / max(entry.median("cpu"), 0.01),
                f"{ours.ahead_of(entry, 'wall'):.2f}" if ours else "",
                f"{ours.ahead_of(entry, 'cpu'):.2f}" if ours else "",
                f"{1000 * entry.median('first'):.0f}",
                {True: "yes", False: "NO", None: ""}[entry.whole],
            )
        )
    head = ("", "images/s", "JPEG MB/s", "images/CPU s", "ours/it", "by CPU", "first ms", "whole")
    print(f"\n{title}")
    print(table(head, rows), flush=True)
    for entry in entries:
        if entry.error:
            print(f"{entry.name}: out, {entry.error}")


def settings(races: dict[str, list[Entry]]) -> None:
    """Print how every contestant was set up."""
    found = {e.name: e for entries in races.values() for e in entries if e.settings}
    rows = [(f"{name} {e.version}".strip(), e.settings) for name, e in found.items()]
    print(f"\nsettings; shuffled as each does it, batches of {BATCH}")
    for name, words in rows:
        print(f"{name}: {words}")


def convert(course: Course, scratch: Path) -> None:
    """Have the contestants with a format of their own write it, and say how long it took."""
    print("\nown formats, written before the race")
    for name in CONVERTING:
        if name in course.names:
            process = course.start(name, 0, scratch / f"convert-{name}")
            try:
                seconds = process.tell("convert")["seconds"]
                print(f"{name}: {seconds:.1f} s, {course.truth.images / seconds:,.0f} images/s")
            except Failed as error:
                print(f"{name}: {error}")
            finally:
                process.stop()


def summary(races: dict[str, list[Entry]]) -> None:
    """Ours against the best peer and the limit: each at its best number of workers."""
    for where in ("local", "S3"):
        best: dict[str, float] = {}
        for title, entries in races.items():
            if title.startswith(where):
                for entry in entries:
                    if entry.laps:
                        rate = entry.laps[0].images / entry.median("wall")
                        best[entry.name] = max(best.get(entry.name, 0.0), rate)
        peers = {name: rate for name, rate in best.items() if name in PEERS}
        if OURS not in best or not peers:
            continue
        first = max(peers, key=peers.__getitem__)
        print(f"\n{where}, each at its best: ours {best[OURS]:,.0f} images/s", end="")
        print(f", {best[OURS] / peers[first]:.2f} x {first}", end="")
        print(f", {best[OURS] / best[LIMIT]:.2f} x {LIMIT}" if LIMIT in best else "")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """A SeaweedFS for the race, as the S3 tests start it: the fields of a `Course` for it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "s3"))
    import seaweed

    folder.mkdir()
    started, process = seaweed.start_s3(folder)
    try:
        yield {
            "endpoint": started.endpoint,
            "key": seaweed.KEY,
            "secret": seaweed.SECRET,
            "bucket": started.bucket,
        }
    finally:
        seaweed.kill_s3(process)


def upload(folder: Path, access: dict[str, str]) -> None:
    """Put every file below `folder` into the bucket, under its relative name."""
    import s3fs

    files = s3fs.S3FileSystem(
        key=access["key"], secret=access["secret"], endpoint_url=access["endpoint"]
    )
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files.put_file(str(path), f"{access['bucket']}/{path.relative_to(folder)}")


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Entry]]:
    """Make the images, convert, race locally and from S3."""
    data = folder / "data"
    data.mkdir()
    images = arguments.images // BATCH * BATCH
    manifest = write_shards(data, jpegs(images), PER_SHARD)
    truth = truth_of(data)
    print(f"{truth.images} JPEGs of {SIZE[0]} x {SIZE[1]}, {truth.jpeg_bytes / images:,.0f} bytes")
    names = (LIMIT, OURS, *arguments.only) if arguments.peers_python else (OURS,)
    python = Path(arguments.peers_python or sys.executable).absolute()
    names = (*names, SCAN) if arguments.peers_python else names
    course = Course(data, [ref.name for ref in manifest.shards], truth, python, names)
    convert(course, folder)
    races: dict[str, list[Entry]] = {}

    def go(course: Course, where: str) -> None:
        for workers in arguments.workers:
            title = f"{where}, {workers} workers"
            races[title] = race(course, workers, arguments.rounds, folder / secrets.token_hex(2))
            report(title, races[title], truth)

    if "local" in arguments.stores:
        go(course, "local")
    if "s3" in arguments.stores:
        with server(folder / "s3") as access:
            upload(data, access)
            go(replace(course, **access), "S3")
    return races


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers-python", help="interpreter with benchmarks/peers/requirements.txt")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stores", nargs="+", choices=("local", "s3"), default=["local", "s3"])
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS, metavar="PEER")
    parser.add_argument("--quick", action="store_true", help="640 images, 1 round, 1 worker")
    parser.add_argument("--out", type=Path, help="write all laps here, as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everyone is stopped
    if arguments.quick:
        arguments.images, arguments.rounds, arguments.workers = 640, 1, [1]
    with tempfile.TemporaryDirectory() as folder:
        races = run(arguments, Path(folder))
    settings(races)
    summary(races)
    if arguments.out:
        laps = {
            title: {e.name: [asdict(lap) for lap in e.laps] for e in entries}
            for title, entries in races.items()
        }
        arguments.out.write_text(json.dumps(laps, indent=1) + "\n")
    ours = [entry for entries in races.values() for entry in entries if entry.name == OURS]
    sys.exit(any(entry.error or not entry.whole for entry in ours))


if __name__ == "__main__":
    main()
