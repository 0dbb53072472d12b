"""Shards among actors: each is finished once, whoever dies, hangs, or is slow."""

import random
import time

import pytest

from dpal.base.errors import DataError
from jobs.caching.schedule import DEPTH, LEAST_S, RETRIES, SLOW, Schedule


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def names(count: int) -> list[str]:
    return [f"p-{index}.tar" for index in range(count)]


def test_an_actor_gets_one_shard_to_do_and_one_to_prepare() -> None:
    schedule = Schedule(names(9), Clock())
    taken = [schedule.take("a") for _ in range(DEPTH + 1)]
    assert taken == ["p-0.tar", "p-1.tar", None]


def test_at_the_end_nobody_prepares_what_an_idle_actor_could_do() -> None:
    schedule = Schedule(names(3), Clock())
    assert [schedule.take("a"), schedule.take("b")] == ["p-0.tar", "p-1.tar"]
    assert schedule.take("a") is None  # the last one is for whoever is free first
    schedule.finished("b", "p-1.tar")
    assert schedule.take("b") == "p-2.tar"


def test_while_there_is_one_for_everybody_the_next_is_prepared() -> None:
    alone = Schedule(names(2), Clock())
    assert [alone.take("a"), alone.take("a")] == ["p-0.tar", "p-1.tar"]
    schedule = Schedule(names(4), Clock())
    taken = [schedule.take(actor) for actor in ("a", "b", "a", "b")]
    assert taken == ["p-0.tar", "p-1.tar", "p-2.tar", None]


def test_what_a_lost_actor_had_is_done_first_and_alone() -> None:
    schedule = Schedule(names(9), Clock())
    assert [schedule.take("a"), schedule.take("a")] == ["p-0.tar", "p-1.tar"]
    schedule.lose("a", "died")
    assert schedule.take("b") == "p-0.tar"
    assert schedule.take("b") is None  # another shard's fault must not be told of this one
    schedule.finished("b", "p-0.tar")
    assert [schedule.take("b"), schedule.take("b")] == ["p-1.tar", None]


def test_a_shard_that_loses_every_actor_is_named_and_its_neighbours_are_not() -> None:
    schedule = Schedule(names(9), Clock())
    bad, lost = "p-1.tar", 0

    def work() -> None:
        nonlocal lost
        for turn in range(1000):
            actor = f"actor {turn}"
            held = [name for name in (schedule.take(actor), schedule.take(actor)) if name]
            if bad in held:
                lost += 1
                schedule.lose(actor, "ended it all")
                continue
            for name in held:
                schedule.finished(actor, name)

    with pytest.raises(DataError, match=r"^shard 'p-1.tar' ended it all$"):
        work()
    assert lost == RETRIES + 1


def test_a_machine_that_is_taken_away_is_nobodys_fault() -> None:
    schedule = Schedule(names(1), Clock())
    for turn in range(5 * RETRIES):
        assert schedule.take(turn) == "p-0.tar"
        schedule.lose(turn, "died", blame=False)
    assert schedule.left == 1


def test_an_idle_actor_does_a_straggler_too_and_the_first_answer_counts() -> None:
    clock = Clock()
    schedule = Schedule(names(6), clock)
    assert schedule.take("slow") == "p-0.tar"
    while (name := schedule.take("quick")) is not None:
        clock.now += 1
        schedule.finished("quick", name)
    assert schedule.left == 1
    clock.now += SLOW * LEAST_S
    assert schedule.take("quick") == "p-0.tar"
    assert schedule.take("third") is None  # two are enough
    assert schedule.finished("quick", "p-0.tar")
    assert schedule.left == 0
    assert not schedule.finished("slow", "p-0.tar")


def test_the_deadline_counts_from_when_a_shard_has_the_teacher() -> None:
    clock = Clock()
    schedule = Schedule(names(4), clock)
    assert [schedule.take("a"), schedule.take("a")] == ["p-0.tar", "p-1.tar"]
    clock.now += 9
    assert schedule.overdue(10) == []
    schedule.finished("a", "p-0.tar")
    clock.now += 9  # 18 s since it was handed out, 9 since it has the teacher
    assert schedule.overdue(10) == []
    clock.now += 2
    assert schedule.overdue(10) == ["a"]


def test_an_idle_actor_costs_no_more_after_many_shards() -> None:
    chance, clock, count = random.Random(0), Clock(), 50_000
    schedule = Schedule(names(count), clock)
    assert schedule.take("slow") == "p-0.tar"
    for _ in range(count - 1):
        name = schedule.take("quick")
        clock.now += chance.random()
        schedule.finished("quick", name)
    schedule.finished("slow", "p-0.tar")
    begin = time.process_time()
    for _ in range(500):  # a median of all that were done would take ten milliseconds each
        clock.now += 2
        assert schedule.take("quick") is None
    assert time.process_time() - begin < 1.0


def test_many_idle_actors_cost_no_more_than_a_few() -> None:
    clock, count = Clock(), 3000
    schedule = Schedule(names(count), clock)
    for actor in range(count):
        assert schedule.take(actor) == f"p-{actor}.tar"
    for actor in range(3):
        clock.now += 0.1
        schedule.finished(actor, f"p-{actor}.tar")
    begin = time.process_time()
    for actor in range(count, 2 * count):  # a look at all that are held takes a millisecond
        assert schedule.take(actor) is None
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_shard_is_finished_once(seed: int) -> None:
    chance, clock, count = random.Random(seed), Clock(), 30
    schedule = Schedule(names(count), clock)
    held: dict[int, list[str]] = {actor: [] for actor in range(3)}
    finished: list[str] = []
    hired = len(held)
    for _ in range(10_000):
        if not schedule.left:
            break
        actor = chance.choice(list(held))
        clock.now += chance.expovariate(1 / (5 * LEAST_S if chance.random() < 0.1 else 2))
        event = chance.random()
        if event < 0.5:
            name = schedule.take(actor)
            held[actor] += [name] if name else []
        elif event < 0.9 and held[actor]:
            name = held[actor].pop(0)
            if schedule.finished(actor, name):
                finished.append(name)
        elif event >= 0.9:
            schedule.lose(actor, "died", blame=False)
            del held[actor]
            held[hired], hired = [], hired + 1
        assert all(len(mine) <= DEPTH for mine in held.values())
    assert sorted(finished) == sorted(names(count))
