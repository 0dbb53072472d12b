"""The `dpal` command as a user meets it: its exit code, its one sentence, what it left on disk."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from jobs.__main__ import main

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# What dpal.base.progress tells beside the one sentence of a failure.
PROGRESS = re.compile(
    r"^\w+: \d+/\d+ \w+s  "
    r"|^cache: starting Ray and the teacher$"
    r"|^cache: .*; going on with the others$"
)


class Answer(NamedTuple):
    """What a command answered.

    Attributes:
        code: exit code.
        sentence: what stands behind `dpal <verb>: `; empty after a success.
        printed: everything on stdout and stderr.
    """

    code: int
    sentence: str
    printed: str


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Answer:
    """Run the command in this process; what it changes in the process is put back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()
    capsys.readouterr()
    try:
        code = main([str(word) for word in words])
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    told = capsys.readouterr()
    return checked(str(words[0]), code, told.out, told.err)


def spawn(
    *words: str | Path,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    sentences: int = 1,
) -> Answer:
    """Run the command in a process of its own; several ranks may tell a sentence each."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=timeout,
    )
    return checked(str(words[0]), done.returncode, done.stdout, done.stderr, sentences)


def files(*folders: Path) -> set[str]:
    """Every file below the folders."""
    return {str(path) for folder in folders for path in folder.rglob("*") if not path.is_dir()}


def checked(verb: str, code: int, out: str, err: str, sentences: int = 1) -> Answer:
    """Assert that a failure is told in one line on stderr, beside lines of progress only."""
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    start = f"dpal {verb}: "
    if code == 0:
        assert not any(line.startswith(start) for line in lines), err
        return Answer(code, "", out + err)
    assert "Traceback" not in out + err, err
    assert len(lines) == sentences, err
    assert all(line.startswith(start) for line in lines), err
    return Answer(code, lines[0].removeprefix(start), out + err)
