"""Contestants of a race as processes: started, told what to do, their CPU seconds counted.

A contestant's process carries a mark in its environment, which every process that it starts
inherits; so the CPU seconds of workers and servers of its own are found, wherever they hang.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "DPAL_RACE"
LIMIT_S = 240.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A contestant could not do what it was told."""


@dataclass(frozen=True)
class Lap:
    """One timed epoch.

    Attributes:
        images: delivered.
        num_bytes: of what was delivered.
        wall: seconds from the first request for a batch until the last batch is there.
        cpu: seconds of all its processes in that time, until they are idle.
        first: seconds to the first batch.
    """

    images: int
    num_bytes: int
    wall: float
    cpu: float
    first: float


class Contestant:
    """A running contestant.

    Args:
        python: interpreter that has its library.
        name: of its file, `peers/with_<name>.py`.
        task: what `peers.common.Task` describes.
        log: file for what it prints.
    """

    def __init__(self, python: Path, name: str, task: dict[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        here = Path(__file__).parent
        task_file = log.with_suffix(".json")
        task_file.write_text(json.dumps(task))
        mark, value = self._mark.split("=")
        temporary = log.parent / "tmp"  # some libraries keep, and sweep, names of their own there
        temporary.mkdir()
        own = {mark: value, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        self._process = subprocess.Popen(
            [python, here / "peers" / "serve.py", name, task_file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            env={**os.environ, **own, "PYTHONPATH": str(here.parent)},
            start_new_session=True,
        )

    def tell(self, do: str, **more: Any) -> dict[str, Any]:
        """Have it do something and wait for the answer.

        Raises:
            Failed: with its own words, when it fails, dies, or takes more than `LIMIT_S`.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{do}: it ended with code {process.wait()}") from None
        if not select.select([process.stdout], [], [], LIMIT_S)[0]:
            raise Failed(f"{do}: no answer within {LIMIT_S:.0f} s")
        line = process.stdout.readline()
        if not line:
            raise Failed(f"{do}: it ended with code {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{do}: {answer['error']}")
        return answer

    def lap(self, number: int) -> Lap:
        """One timed epoch. Raises Failed."""
        before = self.cpu_seconds()
        answer = self.tell("epoch", number=number)
        cpu = self._settle() - before
        return Lap(answer["images"], answer["bytes"], answer["wall"], cpu, answer["first"])

    def cpu_seconds(self) -> float:
        """Seconds that all its processes, and those of theirs that ended, have computed."""
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def stop(self) -> None:
        """End it with all processes that it started."""
        for pid in [self._process.pid, *self._pids()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()

    def _settle(self) -> float:
        """Its CPU seconds once it rests, so that it does not run into the next one's turn."""
        now = self.cpu_seconds()
        for _ in range(20):
            time.sleep(0.1)
            before, now = now, self.cpu_seconds()
            if now - before < 0.02:
                break
        return now

    def _pids(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self._mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)
                except OSError:
                    continue  # it has ended, or is not ours


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that it has waited for (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS
