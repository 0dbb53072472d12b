"""What a progress bar tells on a terminal, and what plain lines tell elsewhere."""

import io
import re
import sys

import pytest

from dpal.base.progress import Progress, say


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(progress: Progress, clock: Clock, stream: io.StringIO) -> list[str]:
    """Lines of a job that does nothing for a minute, ten units in the next, and one more."""
    with progress:
        for _ in range(60):
            clock.now += 1
            progress.advance(0, "at work")
        for _ in range(60):
            clock.now += 1
            progress.advance(1, "at work")
    return stream.getvalue().splitlines()


def test_a_plain_line_is_never_told_twice() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = shown(Progress("job", 60, "unit", stream=stream, clock=clock), clock, stream)
    assert lines[0] == "job: 0/60 units  no estimate yet  at work"
    assert lines[1] == "job: 1/60 units  0.02 units/s  3599 s left  at work"
    assert lines[-1] == "job: 60/60 units  0.50 units/s  in 120 s  at work"
    assert len(set(lines)) == len(lines) == 8


def test_what_is_prepared_is_no_part_of_the_rate() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("job", 30, "unit", initial=10, stream=stream, clock=clock) as progress:
        progress.prepare("loading")
        assert stream.getvalue() == "job: loading\n"
        clock.now += 1000
        progress.begin()
        clock.now += 10
        progress.advance(10)
    assert stream.getvalue().splitlines()[1:] == ["job: 20/30 units  1.00 units/s  10 s left"]


def test_the_bar_says_what_is_prepared_and_leaves_it_out_of_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(), Terminal()
    with Progress("job", 30, "unit", stream=stream) as progress:
        monkeypatch.setattr(progress._bar, "_time", clock)
        progress._bar.start_t = progress._bar.last_print_t = 0.0
        progress.prepare("loading")
        assert "loading" in stream.getvalue().rpartition("\r")[2]
        clock.now = 1000.0
        progress.begin()
        clock.now = 1010.0
        progress.advance(30)
    last = re.findall(r"30/30 \[\S+", stream.getvalue())[-1]
    assert last == "30/30 [00:10<00:00,"


def test_nothing_begun_and_nothing_prepared_is_no_line() -> None:
    stream = io.StringIO()
    with Progress("job", 30, "unit", stream=stream):
        pass
    assert stream.getvalue() == ""


def test_a_sentence_stands_on_a_line_of_its_own_above_the_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("job", 30, "unit"):
        say("one thing")
        on_screen = [line.rpartition("\r")[2] for line in stream.getvalue().split("\n")]
    assert on_screen[0] == "one thing"
    assert on_screen[1].startswith("job:   0%")
