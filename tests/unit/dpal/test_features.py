"""Feature extraction: order, batches and dtypes, whatever the batch size."""

import numpy as np
import pytest
import torch

from dpal.evaluate.features import extract
from dpal.model.tokens import Tokens


class MeanColour:
    """A backbone whose tokens are the mean colours of 16 x 16 blocks."""

    width, stride = 3, 16

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> Tokens:
        assert pixels.dtype == torch.uint8
        self.batches.append(len(pixels))
        blocks = pixels.float().unflatten(1, (-1, 16)).unflatten(3, (-1, 16)).mean((2, 4))
        return Tokens(blocks.mean((1, 2)), blocks.flatten(1, 2))


def pictures(n: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 32, 16, 3), np.uint8))


def test_features_keep_the_order_of_images_for_every_batch_size():
    images = pictures(7)
    expected = np.stack([image.mean((0, 1)) for image in images])
    for batch_size, batches in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])):
        backbone = MeanColour()
        features = extract(backbone, iter(images), patches=True, batch_size=batch_size)
        assert backbone.batches == batches
        assert features.cls.numpy() == pytest.approx(expected, abs=1e-3)
        assert features.grid == (2, 1)
        assert features.patches.shape == (7, 2, 3)
        assert features.patches[4, 1].numpy() == pytest.approx(
            images[4][16:].mean((0, 1)), rel=1e-3
        )


def test_patches_are_kept_only_when_asked_for():
    assert extract(MeanColour(), pictures(2)).patches is None


def test_no_image_and_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match="no image"):
        extract(MeanColour(), [])
    backbone = MeanColour()
    backbone.stride = 8
    with pytest.raises(ValueError, match="gave 2 patches"):
        extract(backbone, pictures(1), patches=True)
