"""The views of SAIP are pure functions with the published geometry and noise."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpal.base.inputs import Views
from dpal.saip.css import search_mask
from dpal.saip.pixels import network_inputs, paste, solarise
from dpal.saip.views import SaipPlan, render_saip, rescaled_sizes, scaled_size

PLAN = SaipPlan(7, Views(), local_crops=7)
SMALL = SaipPlan(3, Views(height=128, width=64), local_crops=2)
SIZES = st.tuples(st.integers(40, 600), st.integers(40, 600))
KEYS = st.text("0123456789abcdef", min_size=8, max_size=8)
BACKGROUNDS = [(300, 200), (64, 512)]


@given(KEYS, SIZES, st.integers(0, 50))
def test_every_view_lies_in_its_image(key: str, size: tuple[int, int], epoch: int) -> None:
    spec = PLAN.spec(key, epoch, size, BACKGROUNDS)
    assert len(spec.locals) == 7
    behind = (spec.background_view, BACKGROUNDS[spec.background])
    for view, whole in (*((view, size) for view in (*spec.globals, *spec.locals)), behind):
        box = view.box
        assert box.height > 0
        assert box.width > 0
        assert 0 <= box.top <= whole[0] - box.height
        assert 0 <= box.left <= whole[1] - box.width


def test_views_cover_the_published_shares_of_the_image() -> None:
    specs = [PLAN.spec(f"{i:08x}", 0, (512, 256), BACKGROUNDS) for i in range(200)]
    globals_ = [view.box for spec in specs for view in spec.globals]
    locals_ = [view.box for spec in specs for view in spec.locals]
    for boxes, (low, high) in ((globals_, (0.8, 1.0)), (locals_, (0.05, 0.8))):
        shares = np.array([box.height * box.width / (512 * 256) for box in boxes])
        aspects = np.array([box.width / box.height for box in boxes])
        assert low - 0.01 <= shares.min() < shares.max() <= high + 0.01
        assert 0.39 <= aspects.min() < aspects.max() <= 0.61
    flips = np.mean([view.flip for spec in specs for view in spec.locals])
    assert 0.45 < flips < 0.55


@given(KEYS, st.integers(0, 50))
def test_pasted_persons_never_overlap_and_stay_in_the_scene(key: str, epoch: int) -> None:
    (top_a, left_a), (top_b, left_b) = PLAN.spec(key, epoch, (300, 150), BACKGROUNDS).corners
    height, width = PLAN.local_size
    assert left_a + width <= left_b
    assert left_a >= 0
    assert left_b + width <= PLAN.scene_size[1]
    for top in (top_a, top_b):
        assert 0 <= top <= PLAN.scene_size[0] - height


def test_views_repeat_by_key_and_epoch_and_change_with_either() -> None:
    def of(key: str, epoch: int, plan: SaipPlan = PLAN) -> object:
        return plan.spec(key, epoch, (300, 150), BACKGROUNDS)

    assert of("aa", 3) == of("aa", 3)
    assert of("aa", 3) != of("aa", 4)
    assert of("aa", 3) != of("ab", 3)
    assert of("aa", 3) != of("aa", 3, SaipPlan(8, Views(), local_crops=7))
    assert np.array_equal(PLAN.noise("aa", 3), PLAN.noise("aa", 3))
    assert not np.array_equal(PLAN.noise("aa", 3), PLAN.noise("aa", 4))


def test_noise_has_the_published_frequencies() -> None:
    noise = np.stack([PLAN.noise(f"{i:08x}", 0) for i in range(400)])  # [400, V, 7]
    blurred, solarised = (noise[:, :, 5] > 0).mean(0), noise[:, :, 6].mean(0)
    assert noise.shape[1] == 3 + 7
    assert blurred[0] == 1
    assert all(0.4 < share < 0.6 for share in blurred[2:-1])
    assert all(0.05 < share < 0.16 for share in blurred[[1, -1]])
    assert all(0.13 < share < 0.27 for share in solarised[[1, -1]])
    assert not solarised[[0, *range(2, 9)]].any()


def test_rescaled_images_are_whole_patches_by_the_published_factors() -> None:
    sizes = [size for step in range(60) for size in rescaled_sizes(0, step, (128, 64))]
    assert set(sizes) == {(96, 48), (112, 64), (144, 80), (160, 80)}
    assert rescaled_sizes(0, 5, (128, 64)) == rescaled_sizes(0, 5, (128, 64))
    assert scaled_size((256, 128), 1.25) == (320, 160)
    assert scaled_size((128, 64), 1.25) == (160, 80)
    assert scaled_size((16, 16), 0.25) == (16, 16)


def test_solarise_inverts_the_bright_half_of_chosen_images() -> None:
    levels = torch.arange(256.0).view(1, 1, 1, 256).expand(2, 3, 1, 256) / 255
    result = solarise(levels, torch.tensor([1.0, 0.0]))
    expected = [255 - v if v >= 128 else v for v in range(256)]
    assert torch.allclose(result[0, 0, 0] * 255, torch.tensor(expected).float(), atol=1e-4)
    assert torch.equal(result[1], levels[1])


def test_pasting_blends_seven_tenths_of_a_person_where_it_belongs() -> None:
    rng = np.random.default_rng(0)
    scene, person = rng.random((2, 3, 20, 20)), rng.random((2, 3, 6, 4))
    corners = [(2, 5), (13, 0)]
    expected = scene.copy()
    for i, (top, left) in enumerate(corners):
        for row in range(6):
            for column in range(4):
                place = (i, slice(None), top + row, left + column)
                expected[place] = 0.7 * person[i, :, row, column] + 0.3 * expected[place]
    result = paste(torch.tensor(scene), torch.tensor(person), torch.tensor(corners))
    assert np.allclose(result, expected)


def test_search_mask_marks_the_patches_whose_centre_is_in_the_box() -> None:
    corners, (height, width), side = [(0, 0), (9, 23), (40, 7)], (64, 32), 8
    mask = search_mask(torch.tensor(corners), (height, width), side)
    expected = [
        [
            top <= 16 * row + 8 < top + height and left <= 16 * column + 8 < left + width
            for row in range(side)
            for column in range(side)
        ]
        for top, left in corners
    ]
    assert np.array_equal(mask.numpy(), np.array(expected, dtype=np.float32))
    assert mask[0].sum() == 8


def test_the_scene_holds_the_last_crop_and_the_halved_first_view() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (200, 90, 3), dtype=np.uint8)
    behind = np.full((128, 128, 3), 100, dtype=np.uint8)
    pixels = render_saip(image, [behind], SMALL.spec("aa", 0, (200, 90), [(128, 128)]), SMALL)
    noise = torch.zeros(1, 5, 7)
    noise[..., :3] = 1
    arrays = [torch.from_numpy(array).unsqueeze(0) for array in pixels]
    inputs = network_inputs(*arrays, noise)
    assert [tuple(part.shape) for part in inputs] == [
        (2, 3, 128, 64),
        (3, 3, 64, 32),
        (1, 3, 128, 128),
    ]
    halved = inputs.globals[0, :, ::2, ::2]
    assert torch.equal(inputs.smalls[2], halved)
    (top_a, left_a), (top_b, left_b) = pixels.corners
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    plain = torch.tensor((100 / 255 - mean) / std).float().view(3, 1, 1)
    for person, top, left in ((inputs.smalls[1], top_a, left_a), (halved, top_b, left_b)):
        found = inputs.scene[0, :, top : top + 64, left : left + 32]
        assert torch.allclose(found, 0.7 * person + 0.3 * plain, atol=1e-4)
