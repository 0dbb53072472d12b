"""Views are pure functions, and composites have the published geometry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpal.base.inputs import Views
from dpal.record import spec_numbers, spec_of
from dpal.views.boxes import boxes_in_view, region_in_view
from dpal.views.plan import ViewPlan
from dpal.views.render import render, render_composite
from dpal.views.specs import Box, Partner, SceneSpec, ViewSpec

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


@given(KEYS, SIZES, SIZES, st.integers(0, 9), st.integers(2, 10))
def test_the_second_person_of_two_images_is_the_partners_base_view(
    key: str, size: tuple[int, int], other: tuple[int, int], row: int, count: int
) -> None:
    row %= count
    for index in range(2):
        partner = Partner(PLAN.partner(key, index, row, count), "other", other)
        assert 0 <= partner.row < count
        assert partner.row != row
        spec = PLAN.composite(key, index, size, [(64, 64)], partner)
        alone = PLAN.composite(key, index, size, [(64, 64)])
        assert spec.partner == partner.row
        assert (spec.corners, spec.persons[0]) == (alone.corners, alone.persons[0])
        assert spec.persons[1] == PLAN.base("other", index, other)
        assert within(spec.persons[1].box, other)
        assert spec_of(spec_numbers(spec)) == spec
        assert len(spec_numbers(spec)) == len(spec_numbers(alone))


def test_every_other_image_of_a_shard_is_somebodys_partner() -> None:
    rows = {PLAN.partner(str(number), 0, 3, 6) for number in range(200)}
    assert rows == {0, 1, 2, 4, 5}
    assert PLAN.partner("a", 0, 3, 100) == ViewPlan(7, PLAN.views).partner("a", 0, 3, 100)


@given(KEYS, st.lists(SIZES, min_size=1, max_size=5))
def test_a_scene_composite_is_most_of_a_scene(key: str, sizes: list[tuple[int, int]]) -> None:
    spec = PLAN.scene(key, 1, sizes)
    height, width = sizes[spec.scene]
    assert within(spec.view.box, (height, width))
    assert spec_of(spec_numbers(spec)) == spec
    if 3 / 4 < width / height < 4 / 3:
        share = spec.view.box.height * spec.view.box.width / (height * width)
        assert share > 0.7  # .8, rounded to whole pixels of small images


def mapped(box: list[float], spec: ViewSpec, size: tuple[int, int]) -> list[float]:
    """One box, corner by corner, in a view of `size` pixels."""
    top, left, height, width = spec.box
    (x0, y0, x1, y1), (rows, columns) = box, size
    x0, x1 = ((x - left) / width * columns for x in (x0, x1))
    y0, y1 = ((y - top) / height * rows for y in (y0, y1))
    return [columns - x1, y0, columns - x0, y1] if spec.flip else [x0, y0, x1, y1]


@given(st.integers(0, 2**31), st.booleans())
def test_boxes_follow_their_persons_into_the_view(seed: int, flip: bool) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 100, (9, 2, 2)), axis=1).reshape(9, 4)
    spec, size = ViewSpec(Box(20, 10, 70, 60), flip), (128, 96)
    expected = []
    for box in corners:
        x0, y0, x1, y1 = mapped(list(box), spec, size)
        cut = [max(x0, 0), max(y0, 0), min(x1, 96), min(y1, 128)]
        area = max(cut[2] - cut[0], 0) * max(cut[3] - cut[1], 0)
        if area > 0 and area >= 0.3 * (x1 - x0) * (y1 - y0):
            expected.append((area, cut))
    actual = boxes_in_view(corners, spec, size)
    wanted = [cut for _area, cut in sorted(expected, reverse=True)]
    assert actual.shape == (len(wanted), 4)
    np.testing.assert_allclose(actual, np.reshape(wanted, (-1, 4)), atol=1e-3)


def test_a_mark_in_a_scene_lies_in_its_mapped_box() -> None:
    scene = np.zeros((200, 300, 3), dtype=np.uint8)
    scene[60:120, 150:190] = 255
    for flip in (False, True):
        spec = ViewSpec(Box(40, 100, 120, 120), flip)
        pixels = render(scene, spec, (256, 256))[..., 0] > 127
        rows, columns = np.nonzero(pixels)
        (box,) = boxes_in_view(np.array([[150.0, 60, 190, 120]]), spec, (256, 256))
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box, found, atol=1.0)


def test_no_more_than_the_largest_boxes_are_kept() -> None:
    sides = np.arange(1, 41)
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], 1).astype(float)
    kept = boxes_in_view(boxes, ViewSpec(Box(0, 0, 50, 50), False), (50, 50))
    assert kept[:, 2].tolist() == list(range(40, 8, -1))


def test_a_person_of_another_image_is_blended_from_its_pixels() -> None:
    person, partner = (np.full((256, 128, 3), grey, dtype=np.uint8) for grey in (200, 50))
    background = np.full((64, 64, 3), 100, dtype=np.uint8)
    spec = PLAN.composite("k", 0, (256, 128), [(64, 64)], Partner(1, "p", (256, 128)))
    pixels = render_composite(person, background, spec, PLAN, partner)
    assert (pixels == 170).all(axis=2).sum() == 128 * 96
    assert (pixels == 65).all(axis=2).sum() == 128 * 96  # .7 * 50 + .3 * 100


def test_pinned_noise_is_of_seed_key_kind_and_index_alone() -> None:
    noise = PLAN.pinned_photometric("a", "base", 1)
    assert ViewPlan(7, PLAN.views, repetition=5).pinned_photometric("a", "base", 1) == noise
    others = [
        PLAN.pinned_photometric("a", "base", 0),
        PLAN.pinned_photometric("a", "composite", 1),
        PLAN.pinned_photometric("b", "base", 1),
        ViewPlan(8, PLAN.views).pinned_photometric("a", "base", 1),
    ]
    assert noise not in others
    assert noise.blur_sigma > 0  # base views are always blurred, as in the reference


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
    for change in ({"count": 2}, {"scale": (0.7, 1.0)}, {"composites": 2}):
        assert ViewPlan(0, Views(**change)).describe() != base
    assert ViewPlan(1, Views()).describe() != base


def test_caches_of_before_keep_their_address_and_their_numbers() -> None:
    assert ViewPlan(0, Views(count=2)).describe() == {
        "version": 1,
        "seed": 0,
        "height": 256,
        "width": 128,
        "count": 2,
        "composites": 1,
        "scale": [0.8, 1.0],
        "aspect": [0.4, 0.6],
        "crop_scale": [0.05, 0.8],
    }
    assert "crop_scale" not in ViewPlan(3, Views(composites=0)).describe()
    plan = ViewPlan(3, Views(height=128, width=64))
    composite = spec_numbers(plan.composite("k", 0, (300, 200), [(99, 88)] * 7)).tolist()
    assert composite == [
        *(2, 3, 0, 0, 95, 88, 0, 68, 58, 209, 115, 1, 3, 15, 292, 171, 0, 55, 22, 3, 78, 0),
    ]
    assert spec_numbers(plan.base("k", 1, (300, 200))).tolist() == [1, 3, 15, 292, 171, 1]


def test_what_a_teacher_sees_otherwise_changes_the_description() -> None:
    kinds = [{}, {"composite": "two"}, {"composite": "scenes"}, {"photometric": "pinned"}]
    texts = {str(ViewPlan(0, Views(**kind)).describe()) for kind in kinds}
    assert len(texts) == len(kinds)
    # No local crop is in a scene, so its share may change.
    scenes = [Views(composite="scenes", crop_scale=share) for share in ((0.05, 0.8), (0.1, 0.8))]
    assert ViewPlan(0, scenes[0]).describe() == ViewPlan(0, scenes[1]).describe()
    assert isinstance(ViewPlan(0, scenes[0]).scene("a", 0, [(50, 60)]), SceneSpec)


@pytest.mark.parametrize("outer_flip", [False, True])
@pytest.mark.parametrize("inner_flip", [False, True])
def test_a_region_says_where_the_pixels_of_a_crop_lie_in_its_base_view(
    outer_flip: bool, inner_flip: bool
) -> None:
    rows, columns = np.mgrid[0:400, 0:200]
    image = np.stack([columns, rows / 2, 0 * rows], axis=2).astype(np.uint8)  # where a pixel is
    outer = ViewSpec(Box(40, 20, 320, 160), outer_flip)
    inner = ViewSpec(Box(120, 50, 128, 96), inner_flip)
    left, top, right, bottom = region_in_view(inner, outer)
    base, crop = render(image, outer, (320, 160)), render(image, inner, (128, 96))
    for i, j in ((4, 4), (64, 20), (120, 90)):
        x, y = left + (j + 0.5) / 96 * (right - left), top + (i + 0.5) / 128 * (bottom - top)
        there = base[int(y * 320), int(x * 160)].astype(int)
        assert np.abs(there - crop[i, j]).max() <= 1, (i, j)
