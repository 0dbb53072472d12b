"""The benchmarks' clockwork, with a clock that the tests move."""

import pytest

from benchmarks.timing import Timing, interleave, table


class Machine:
    """A clock, and work that takes a given time on a machine that gets slower every round."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + self.calls.count(name))

        return run


def test_pieces_take_turns_and_warm_up_does_not_count() -> None:
    machine = Machine()
    work = {"a": machine.work("a", 1.0), "b": machine.work("b", 2.0)}
    timings = interleave(work, 2, warm_up=1, clock=machine.clock)
    assert machine.calls == ["a", "b", "a", "b", "a", "b"]
    assert timings["a"].seconds == pytest.approx((3.0, 4.0))  # its first turn took 2.0


def test_a_ratio_is_not_moved_by_a_machine_that_slows_down() -> None:
    machine = Machine()
    work = {"a": machine.work("a", 1.0), "b": machine.work("b", 2.5)}
    timings = interleave(work, 5, clock=machine.clock)
    assert timings["b"].over(timings["a"]) == pytest.approx(2.5)
    assert timings["a"].seconds[0] != timings["a"].seconds[-1]


def test_one_disturbed_round_moves_neither_median_nor_ratio() -> None:
    calm, disturbed = Timing((1.0, 1.0, 1.0)), Timing((2.0, 90.0, 2.0))
    assert disturbed.median == 2.0
    assert disturbed.over(calm) == 2.0


def test_rounds_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"a": lambda: None}, 0)


def test_a_table_aligns_its_columns() -> None:
    lines = table(("what", "per s"), [("a", 1234.5), ("longer", 0.12345)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith("1,234")
    assert lines[3].endswith("0.123")
