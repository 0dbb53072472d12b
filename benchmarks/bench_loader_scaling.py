"""What does not grow: the loader's start and memory with the shards, a seek with its position.

    python benchmarks/bench_loader_scaling.py [--shards 100 1000] [--rounds 5]

Every start is a fresh process over shards of 100 tiny images (16 x 8). A seek is a new loader that
begins at a step of its own and gives its first batch; the shards are in the page cache. The order
is timed without images, over samples in shards of 1,000.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from loader_data import jpegs, write_shards
from timing import table

from dpal.base.recipe import Train

TINY, PER_SHARD, BATCH = (16, 8), 100, 64
SEEKS = (0.0, 0.25, 0.5, 0.75, 0.99, 3.0)  # in epochs
ORDER_SAMPLES = (10**5, 10**7)
ORDER_DRAWS = 64_000
LANES, WINDOW = (Train.model_fields[name].default for name in ("lanes", "window"))
START_BAR_S, MEMORY_BAR = 3.0, 0.10


def start(folder: Path, steps: int) -> None:
    """In a process of its own: seconds from nothing to the first batch, and peak memory, as JSON.

    Memory is read after `steps` batches, when the loader has read ahead as far as it ever does.
    """
    begin = time.perf_counter() - _process_age()
    batches = _open(folder, threads=2)(0)
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(steps):
        next(batches)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, own = (int(status[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon"))
    batches.close()
    print(json.dumps({"first": first, "peak": peak, "own": own}))


def _process_age() -> float:
    """Seconds since this process was started: imports are part of a start (proc(5))."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _open(folder: Path, threads: int) -> Any:
    """A function from a step to the batches of a new loader that begins there."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import with_dpal
    from common import Task

    from data_tools.manifest import load_manifest
    from data_tools.storage import LocalStore

    manifest = load_manifest(LocalStore(folder))
    task = Task(
        shards=tuple(ref.name for ref in manifest.shards),
        folder=str(folder),
        bucket="",
        endpoint="",
        key="",
        secret="",
        images=manifest.num_samples,
        batch=BATCH,
        height=TINY[0],
        width=TINY[1],
        workers=threads,
        scratch=str(folder / "scratch"),
    )
    return with_dpal.open_loader(task)


def measure_starts(folders: dict[int, Path], rounds: int) -> None:
    """Start over few and many shards, in turns."""
    seen: dict[int, list[dict[str, float]]] = {count: [] for count in folders}
    for _ in range(rounds):
        for count, folder in folders.items():
            steps = min(folders) * PER_SHARD // BATCH
            command = [sys.executable, __file__, "--start", str(folder), "--steps", str(steps)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seen[count].append(json.loads(answer))
    median = {
        count: {key: statistics.median(each[key] for each in all_) for key in all_[0]}
        for count, all_ in seen.items()
    }
    rows = [(f"{c:,} shards, {c * PER_SHARD:,} samples", *m.values()) for c, m in median.items()]
    head = ("", "start to first batch, s", "peak memory, MiB", "without mapped files, MiB")
    print(table(head, rows))
    peaks = [m["peak"] for m in median.values()]
    growth = max(peaks) / min(peaks) - 1
    slowest = max(m["first"] for m in median.values())
    met = slowest < START_BAR_S and growth <= MEMORY_BAR
    print(
        f"slowest start {slowest:.2f} s, memory differs by {100 * growth:.0f} %; bars: "
        f"{START_BAR_S} s, {100 * MEMORY_BAR:.0f} %: {'met' if met else 'NOT MET'}"
    )


def measure_seeks(folder: Path, rounds: int) -> None:
    """First batch of a new loader, by the position it begins at."""
    from data_tools.manifest import load_manifest
    from data_tools.storage import LocalStore

    steps = load_manifest(LocalStore(folder)).num_samples // BATCH
    begin_at = _open(folder, threads=0)
    wall: dict[float, list[float]] = {epochs: [] for epochs in SEEKS}
    cpu: dict[float, list[float]] = {epochs: [] for epochs in SEEKS}
    for turn in range(rounds + 1):
        for epochs in SEEKS:
            before, cpu_before = time.perf_counter(), time.process_time()
            batches = begin_at(int(epochs * steps))
            next(batches)
            if turn:  # the first fills the page cache
                wall[epochs].append(1000 * (time.perf_counter() - before))
                cpu[epochs].append(1000 * (time.process_time() - cpu_before))
            batches.close()
    rows = [
        (f"epoch {epochs:g}", statistics.median(wall[epochs]), statistics.median(cpu[epochs]))
        for epochs in SEEKS
    ]
    print(table(("seek to", "first batch, ms", "CPU ms"), rows))


def measure_order() -> None:
    """Cost of the order alone."""
    from data_tools.order import Order

    rows = []
    for samples in ORDER_SAMPLES:
        sizes = (1000,) * (samples // 1000)
        tracemalloc.start()
        before = time.process_time()
        order = Order(0, sizes, global_batch=BATCH, lanes=LANES, window=WINDOW)
        order.places(0, BATCH)
        first = 1000 * (time.process_time() - before)
        for position in range(0, ORDER_DRAWS, BATCH):
            order.places(position, BATCH)
        memory = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        before = time.process_time()  # again, without the tracer's weight
        order = Order(1, sizes, global_batch=BATCH, lanes=LANES, window=WINDOW)
        for position in range(0, ORDER_DRAWS, BATCH):
            order.places(position, BATCH)
        each = 1e9 * (time.process_time() - before) / ORDER_DRAWS
        rows.append((f"{samples:,} samples", each, first, memory))
    print(table(("order", "ns a sample", "first batch, CPU ms", "peak memory, MiB"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as place:
        folders = {}
        for count in arguments.shards:
            folders[count] = Path(place) / str(count)
            folders[count].mkdir()
            write_shards(folders[count], jpegs(count * PER_SHARD, TINY), PER_SHARD)
        measure_starts(folders, arguments.rounds)
        print()
        measure_seeks(folders[max(folders)], arguments.rounds)
    print()
    measure_order()


if __name__ == "__main__":
    main()
