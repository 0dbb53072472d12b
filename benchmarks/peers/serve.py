"""One contestant in a process of its own, told over stdin what to do and answering on stdout.

    python benchmarks/peers/serve.py NAME TASK.json

A line in is `{"do": ..., "number": n}`, a line out is JSON: the result, or `error`. To do:

    convert   write the images in the contestant's own format
    open      start afresh (with an empty cache, for contestants that keep one)
    check     run epoch n and sum up every pixel
    epoch     run epoch n as fast as it comes
"""

import contextlib
import importlib
import json
import os
import shutil
import sys
import time
import traceback
import zlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import Epoch, Task


class Contestant:
    """A contestant's module with what it has open."""

    def __init__(self, name: str, task: Task) -> None:
        self.task, self.module = task, importlib.import_module(f"with_{name}")
        self.batches: Epoch | None = None

    def convert(self) -> dict[str, Any]:
        """Write the images in the contestant's own format, if it has one."""
        begin = time.perf_counter()
        if hasattr(self.module, "convert"):
            self.module.convert(self.task)
        return {"seconds": time.perf_counter() - begin}

    def open(self) -> dict[str, Any]:
        """Start afresh, with an empty scratch folder."""
        self.batches = None
        shutil.rmtree(self.task.scratch, ignore_errors=True)
        Path(self.task.scratch).mkdir(parents=True)
        begin = time.perf_counter()
        self.batches = self.module.open_epochs(self.task)
        seconds = time.perf_counter() - begin
        distribution = self.module.DISTRIBUTION
        return {
            "version": version(distribution) if distribution else "",
            "settings": self.module.SETTINGS,
            "caches": getattr(self.module, "CACHES", False),
            "seconds": seconds,
        }

    def check(self, number: int) -> dict[str, Any]:
        """Every image of an epoch as the CRC-32 of its pixels."""
        sums: list[int] = []
        for batch in self._batches(number):
            sums += [zlib.crc32(np.ascontiguousarray(image)) for image in batch]
        return {"sums": sums}

    def epoch(self, number: int) -> dict[str, Any]:
        """Images, bytes, seconds until the first and until the last batch of an epoch is there."""
        images = num_bytes = 0
        first = wall = 0.0
        begin = time.perf_counter()
        for batch in self._batches(number):
            wall = time.perf_counter() - begin
            first = first or wall
            images += len(batch)
            num_bytes += batch.nbytes if isinstance(batch, np.ndarray) else sum(map(len, batch))
        return {"images": images, "bytes": num_bytes, "wall": wall, "first": first}

    def _batches(self, number: int) -> Iterable[Any]:
        if self.batches is None:
            raise RuntimeError("not open")
        return self.batches(number)


def main() -> None:
    name, task_file = sys.argv[1:3]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    task = Task.read(Path(task_file).read_text())
    contestant: Contestant | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            contestant = contestant or Contestant(name, task)
            answer = getattr(contestant, order.pop("do"))(**order)
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {text[-300:]}"}
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
