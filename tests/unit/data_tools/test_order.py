"""The sample sequence: complete, shuffled, and the same for every number of ranks."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.loader import Slice
from data_tools.order import Order, Place

SHARDS = st.lists(st.integers(1, 30), min_size=1, max_size=25).map(tuple)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(0, 5), st.integers(0, 3), st.integers(1, 9))
def test_every_sample_comes_exactly_once_an_epoch(
    sizes: tuple[int, ...], seed: int, epoch: int, window: int
) -> None:
    order = Order(seed, sizes, window)
    places = list(order.places(epoch * order.num_samples, order.num_samples))
    assert {place.epoch for place in places} == {epoch}
    expected = Counter((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    assert Counter((place.shard, place.row) for place in places) == expected


@settings(max_examples=30, deadline=None)
@given(SHARDS, st.integers(0, 400), st.integers(1, 50))
def test_seeking_gives_what_reading_through_gives(
    sizes: tuple[int, ...], start: int, count: int
) -> None:
    order = Order(3, sizes)
    through = list(order.places(0, start + count))[start:]
    assert list(Order(3, sizes).places(start, count)) == through


def test_epochs_differ_and_seeds_differ() -> None:
    order = Order(0, (50,) * 4)
    first, second = (
        [(place.shard, place.row) for place in order.places(epoch * 200, 200)] for epoch in (0, 1)
    )
    other = [(place.shard, place.row) for place in Order(1, (50,) * 4).places(0, 200)]
    assert first != second
    assert first != other
    assert first != sorted(first)


def test_global_batches_are_the_same_for_every_number_of_ranks() -> None:
    order = Order(5, (17, 40, 3, 29, 64))

    def global_batch(step: int, ranks: int, micro: int) -> list[Place]:
        places: list[Place] = []
        for rank in range(ranks):
            for start in Slice(24, micro, rank, ranks).starts(step):
                places += order.places(start, micro)
        return places

    for step in (0, 3, 11):
        expected = global_batch(step, 1, 24)
        for ranks, micro in ((1, 6), (2, 12), (2, 3), (3, 4), (4, 6), (6, 4), (8, 3)):
            assert global_batch(step, ranks, micro) == expected
