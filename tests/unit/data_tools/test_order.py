"""The sample sequence: complete, shuffled, elastic, and read shard by shard."""

import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.loader import Slice
from data_tools.order import Order, Place, num_lanes

SHARDS = st.lists(st.integers(1, 30), min_size=1, max_size=25).map(tuple)
BATCHES = st.sampled_from((1, 2, 7, 12, 24, 48))
LANES = st.sampled_from((1, 2, 3, 8, 24, 48))
Sizes = tuple[int, ...]


def made_order(sizes: Sizes, seed: int = 3, batch: int = 24, lanes: int = 24, window: int = 3):
    return Order(seed, sizes, global_batch=batch, lanes=lanes, window=window)


def step_places(order: Order, step: int, ranks: int, micro: int) -> list[list[Place]]:
    """What every rank reads in one step."""
    parts = (Slice(order.global_batch, micro, rank, ranks) for rank in range(ranks))
    return [[p for s in part.starts(step) for p in order.places(s, micro)] for part in parts]


@settings(max_examples=100, deadline=None)
@given(SHARDS, st.integers(0, 5), BATCHES, LANES, st.integers(1, 6))
def test_every_sample_comes_exactly_once_an_epoch(
    sizes: Sizes, seed: int, batch: int, lanes: int, window: int
) -> None:
    order = made_order(sizes, seed, batch, lanes, window)
    places = order.places(0, (3 * order.num_samples // batch + 1) * batch)
    everything = Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    for epoch in range(3):
        drawn = [place for place in places if place.epoch == epoch]
        assert Counter((place.shard, place.row) for place in drawn) == everything


@settings(max_examples=60, deadline=None)
@given(SHARDS, BATCHES, LANES, st.integers(0, 2000), st.integers(1, 50))
def test_seeking_gives_what_reading_through_gives(
    sizes: Sizes, batch: int, lanes: int, start: int, count: int
) -> None:
    through = made_order(sizes, batch=batch, lanes=lanes).places(0, start + count)[start:]
    assert made_order(sizes, batch=batch, lanes=lanes).places(start, count) == through


@settings(max_examples=50, deadline=None)
@given(SHARDS, st.integers(0, 5), st.integers(0, 300), st.sampled_from((1, 2, 3, 4, 6, 8)))
def test_global_batches_are_the_same_for_every_number_of_ranks(
    sizes: Sizes, seed: int, step: int, ranks: int
) -> None:
    order = made_order(sizes, seed)
    (alone,) = step_places(order, step, 1, 24)
    for micro in (24 // ranks, 1):
        together = step_places(made_order(sizes, seed), step, ranks, micro)
        assert [place for part in together for place in part] == alone


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=12, max_size=60).map(tuple),
    st.integers(0, 5),
    st.sampled_from((2, 3, 4, 6, 8)),
)
def test_a_shard_is_read_by_one_rank_or_cut_between_neighbours(
    sizes: Sizes, seed: int, ranks: int
) -> None:
    order = made_order(sizes, seed)
    readers: dict[tuple[int, int], set[int]] = {}
    for step in range(-(-2 * order.num_samples // 24)):
        for rank, places in enumerate(step_places(order, step, ranks, 24 // ranks)):
            for place in places:
                readers.setdefault((place.epoch, place.shard), set()).add(rank)
    for epoch in range(2):
        visits = sum(len(who) for (e, _shard), who in readers.items() if e == epoch)
        # Each of the cuts between two ranks goes through one shard at most.
        assert len(sizes) <= visits <= len(sizes) + ranks - 1


def test_a_shard_is_not_left_and_opened_again() -> None:
    """Even a shard that two lanes share is read in one go: no second fetch in an epoch."""
    order = made_order((40,) * 501, batch=24, lanes=24, window=2)
    steps: dict[int, list[int]] = {}
    for step in range(order.num_samples // 24):
        for place in order.places(24 * step, 24):
            if place.epoch == 0:
                steps.setdefault(place.shard, []).append(step)
    # A lane reads a window of 80 samples in 80 steps; two lanes meet within one window each.
    assert max(max(seen) - min(seen) for seen in steps.values()) <= 2 * 80


@settings(max_examples=60, deadline=None)
@given(SHARDS, BATCHES, LANES, st.integers(1, 6))
def test_a_shard_is_due_before_it_is_read(
    sizes: Sizes, batch: int, lanes: int, window: int
) -> None:
    order = made_order(sizes, batch=batch, lanes=lanes, window=window)
    share, again = batch // order.lanes, dict.fromkeys(range(order.lanes), 0)
    due: dict[int, tuple[int, ...]] = {}
    for step in range(2 * order.num_samples // batch + 2):
        for place, lane in zip(
            order.places(batch * step, batch),
            (lane for lane in range(order.lanes) for _ in range(share)),
            strict=True,
        ):
            turn = step * share
            if turn >= again[lane]:
                due[lane], again[lane] = order.due(lane, turn)
                assert again[lane] > turn
                assert len(due[lane]) <= 2 * window
            if share == 1:
                assert place.shard in due[lane]


def test_epochs_differ_and_seeds_differ() -> None:
    order = made_order((50,) * 4, seed=0)
    places = order.places(0, 24 * 17)
    first, second = (
        [(place.shard, place.row) for place in places if place.epoch == epoch] for epoch in (0, 1)
    )
    other = [(place.shard, place.row) for place in made_order((50,) * 4, seed=1).places(0, 200)]
    assert first != second[: len(first)]
    assert first[:200] != other
    assert first != sorted(first)


def test_a_batch_mixes_many_shards_and_a_lane_mixes_its_window() -> None:
    order = made_order((100,) * 200, batch=96, lanes=48, window=4)
    middle = order.places(96 * 100, 96)
    assert len({place.shard for place in middle}) >= 48
    one_lane = [order.places(96 * step, 1)[0].shard for step in range(60, 160)]
    assert len(set(one_lane)) >= 4
    changes = sum(a != b for a, b in pairwise(one_lane))
    assert changes > len(one_lane) / 2  # drawn in turns, not one shard after the other


@pytest.mark.parametrize(
    ("lanes", "batch", "used"), [(48, 64, 16), (48, 96, 48), (64, 1024, 64), (48, 50, 2), (5, 7, 1)]
)
def test_every_lane_has_the_same_share_of_a_batch(lanes: int, batch: int, used: int) -> None:
    assert num_lanes(lanes, batch) == used
    order = made_order((10,) * 40, batch=batch, lanes=lanes)
    assert order.lanes == used


def test_memory_is_a_few_numbers_a_shard_and_the_windows_in_use() -> None:
    def peak(shards: int) -> int:
        sizes = (1000,) * shards
        tracemalloc.start()
        order = made_order(sizes, batch=64, lanes=64, window=2)
        order.places(64 * 900, 64)
        _now, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    few, many = peak(2_000), peak(20_000)
    assert many - few < 200 * 18_000  # bytes a shard; 18 million samples have no part in it
