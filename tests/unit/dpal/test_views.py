"""Views are pure functions, and composites have the published geometry."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpal.base.recipe import Views
from dpal.views import Box, ViewPlan, ViewSpec, render, render_composite

PLAN = ViewPlan(7, Views(count=4, composites=2))
SIZES = st.tuples(st.integers(32, 600), st.integers(32, 600))
KEYS = st.text("0123456789abcdef", min_size=8, max_size=8)


def within(box: Box, size: tuple[int, int]) -> bool:
    return (
        box.height > 0
        and box.width > 0
        and 0 <= box.top <= size[0] - box.height
        and 0 <= box.left <= size[1] - box.width
    )


@given(KEYS, SIZES, st.integers(0, 50))
def test_every_box_lies_in_its_image_and_crops_lie_in_their_view(
    key: str, size: tuple[int, int], epoch: int
) -> None:
    for index in range(4):
        base = PLAN.base(key, index, size)
        assert within(base.box, size)
        for crop in PLAN.crops(key, index, epoch, size):
            moved = crop.box._replace(
                top=crop.box.top - base.box.top, left=crop.box.left - base.box.left
            )
            assert within(moved, (base.box.height, base.box.width))


@given(KEYS, SIZES)
def test_composite_persons_never_overlap_and_stay_on_the_canvas(
    key: str, size: tuple[int, int]
) -> None:
    for index in range(2):
        spec = PLAN.composite(key, index, size, [(300, 400), (64, 64)])
        (top_a, left_a), (top_b, left_b) = spec.corners
        assert 0 <= top_a <= 126
        assert 0 <= top_b <= 126
        assert 0 <= left_a <= 62
        assert left_a + 96 <= left_b <= 158
        assert within(spec.background_view.box, [(300, 400), (64, 64)][spec.background])


def test_a_view_depends_on_seed_key_and_index_alone() -> None:
    size = (200, 100)
    again = ViewPlan(7, Views(count=4, composites=2))
    assert again.base("a", 2, size) == PLAN.base("a", 2, size)
    assert ViewPlan(8, PLAN.views).base("a", 2, size) != PLAN.base("a", 2, size)
    assert PLAN.base("b", 2, size) != PLAN.base("a", 2, size)
    assert PLAN.base("a", 3, size) == PLAN.base("a", 2, size)._replace(flip=True)
    assert PLAN.crops("a", 0, 1, size) != PLAN.crops("a", 0, 2, size)


def test_every_view_is_shown_once_in_count_epochs() -> None:
    for key in ("a", "b", "c"):
        for first in (0, 4, 8):
            seen = sorted(PLAN.view_index(key, epoch) for epoch in range(first, first + 4))
            assert seen == [0, 1, 2, 3]


def test_rendering_the_whole_image_at_its_size_changes_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)
    whole = Box(0, 0, 40, 20)
    assert np.array_equal(render(image, ViewSpec(whole, False), (40, 20)), image)
    assert np.array_equal(render(image, ViewSpec(whole, True), (40, 20)), image[:, ::-1])


def test_composite_blends_seven_tenths_of_each_person() -> None:
    person = np.full((256, 128, 3), 200, dtype=np.uint8)
    background = np.full((64, 64, 3), 100, dtype=np.uint8)
    spec = PLAN.composite("k", 0, (256, 128), [(64, 64)])
    pixels = render_composite(person, background, spec, PLAN)
    covered = (pixels == 170).all(axis=2)  # .7 * 200 + .3 * 100
    assert covered.sum() == 2 * 128 * 96
    assert (pixels[~covered] == 100).all()


def test_what_a_teacher_never_sees_does_not_change_the_description() -> None:
    base = ViewPlan(0, Views()).describe()
    assert ViewPlan(0, Views(crops=4, photometric="off")).describe() == base
    for change in ({"count": 4}, {"scale": (0.7, 1.0)}, {"composites": 2}):
        assert ViewPlan(0, Views(**change)).describe() != base
    assert ViewPlan(1, Views()).describe() != base
