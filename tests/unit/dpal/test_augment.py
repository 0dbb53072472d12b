"""Colour noise against a restatement pixel by pixel, and apart from the batch it is applied in."""

import colorsys

import numpy as np
import pytest
import torch

from dpal.augment import add_noise, blur, luma, shift_hue
from dpal.pixels import noisy_pixels
from dpal.views.specs import Photometric

NEUTRAL = Photometric(1.0, 1.0, 1.0, 0.0, False, 0.0)


def planes(count: int, height: int = 6, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)
    drawn[:, :, 0] = drawn[:, :1, 0]  # grey pixels: no hue
    drawn[:, 1, 1] = drawn[:, 0, 1]  # red and green equal
    drawn[:, 2, 2] = drawn[:, 1, 2]  # green and blue equal
    drawn[:, :, 3] = drawn[:, :, 3].round()  # black, white and pure colours
    return drawn


def noise(*rows: Photometric) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("turn", [-0.1, 0.0, 0.05, 0.1, 0.4])
def test_hue_turns_as_in_the_hsv_colour_model(turn: float) -> None:
    image = planes(1)
    turned = shift_hue(image, torch.full((1, 1, 1, 1), turn, dtype=torch.float64))
    for y in range(image.shape[2]):
        for x in range(image.shape[3]):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[0, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            np.testing.assert_allclose(turned[0, :, y, x].numpy(), expected, atol=1e-6)


def test_brightness_contrast_and_saturation_follow_their_formulas() -> None:
    image = planes(1)
    actual = add_noise(image, noise(NEUTRAL._replace(brightness=1.3, contrast=0.7, saturation=1.2)))
    x = np.clip(image[0].numpy() * 1.3, 0, 1)
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    x = np.clip((x * weights).sum(0).mean() * 0.3 + 0.7 * x, 0, 1)
    grey = (x * weights).sum(0)
    x = np.clip(grey + 1.2 * (x - grey), 0, 1)
    np.testing.assert_allclose(actual[0].numpy(), x, atol=1e-6)


def test_grey_leaves_only_the_luma() -> None:
    image = planes(2)
    actual = add_noise(image, noise(NEUTRAL._replace(grey=True), NEUTRAL))
    torch.testing.assert_close(actual[0], luma(image[:1])[0].expand(3, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(actual[1], image[1], atol=1e-6, rtol=0)


def test_only_images_with_a_sigma_are_blurred() -> None:
    image = planes(3)
    actual = add_noise(image, noise(NEUTRAL, NEUTRAL._replace(blur_sigma=1.5), NEUTRAL))
    torch.testing.assert_close(actual[[0, 2]], image[[0, 2]], atol=1e-6, rtol=0)
    expected = blur(image[1:2], torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(actual[1:2], expected, atol=1e-6, rtol=0)
    assert actual[1].std() < 0.8 * image[1].std()


def test_noise_does_not_depend_on_the_batch() -> None:
    """Large enough for several portions of the batch."""
    image = planes(5, 256, 128)
    rows = noise(*(Photometric(0.8 + i / 9, 1.1, 0.9, i / 50, i == 2, i % 2) for i in range(5)))
    together = add_noise(image, rows)
    alone = torch.cat([add_noise(image[i : i + 1], rows[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_a_teachers_noisy_pixels_are_the_students_within_rounding() -> None:
    views = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    rows = noise(Photometric(1.3, 0.7, 1.1, 0.05, False, 1.0), NEUTRAL).float()
    pixels = noisy_pixels(torch.from_numpy(views), rows)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels[1].numpy(), views[1])
    students = add_noise(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255, rows)
    error = students.permute(0, 2, 3, 1) * 255 - pixels.float()
    assert error.abs().max() <= 0.51
    assert (pixels[0].float() - torch.from_numpy(views[0]).float()).abs().mean() > 5
