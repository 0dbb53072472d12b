"""The linear parsing probe: it learns what tokens say, no more, and counts pixels rightly."""

import numpy as np
import pytest
import torch

from dpal.evaluate.features import Features
from dpal.evaluate.parsing import ProbeSettings, _confusion, _scores, probe

CLASSES = ("background", "torso", "legs")
GRID, SIZE = (8, 4), (64, 32)


def drawn(n: int, seed: int, noise: float = 0.1, width: int = 12):
    """Features whose tokens hold the class of their 8 x 8 block linearly, and the masks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 3, (n, 4, 2)).repeat(2, 1).repeat(2, 2)  # [n, 8, 4]
    code = np.random.default_rng(0).normal(size=(3, width))
    tokens = code[blocks.reshape(n, -1)] * 40 + 300 + rng.normal(0, noise * 40, (n, 32, width))
    masks = blocks.repeat(8, 1).repeat(8, 2).astype(np.uint8)
    return Features(torch.zeros(n, 1), torch.from_numpy(tokens).half(), GRID), masks


def test_probe_reads_classes_that_tokens_hold_linearly():
    train, test = drawn(60, 1), drawn(30, 2)
    scores = probe(*train, *test, CLASSES)
    assert scores.mean_iou > 75  # bilinear edges between 16-pixel blocks cost the rest
    assert scores.iou.keys() == set(CLASSES)


def test_probe_finds_nothing_in_tokens_that_say_nothing():
    (train, train_masks), (test, test_masks) = drawn(60, 1), drawn(30, 2)
    rng = torch.Generator().manual_seed(0)
    empty = [
        f._replace(patches=torch.randn(f.patches.shape, generator=rng).half())
        for f in (train, test)
    ]
    scores = probe(empty[0], train_masks, empty[1], test_masks, CLASSES)
    assert scores.mean_iou < 35


def test_probe_is_deterministic_and_independent_of_the_global_generator():
    train, test = drawn(40, 1, noise=2.0), drawn(20, 2, noise=2.0)
    settings = ProbeSettings(steps=20, batch_size=16)
    torch.manual_seed(1)
    first = probe(*train, *test, CLASSES, settings)
    torch.manual_seed(2)
    torch.rand(3)
    assert probe(*train, *test, CLASSES, settings) == first
    assert probe(*train, *test, CLASSES, settings._replace(seed=1)) != first


def test_scale_and_offset_of_channels_do_not_matter():
    (train, train_masks), (test, test_masks) = drawn(40, 1), drawn(20, 2)
    settings = ProbeSettings(steps=50)
    plain = probe(train, train_masks, test, test_masks, CLASSES, settings)
    scale = torch.logspace(-1, 1, 12)
    moved = [f._replace(patches=f.patches.float() * scale - 7) for f in (train, test)]
    other = probe(moved[0], train_masks, moved[1], test_masks, CLASSES, settings)
    assert other.mean_iou == pytest.approx(plain.mean_iou, abs=0.5)


def test_ignored_pixels_change_nothing():
    (train, train_masks), (test, test_masks) = drawn(40, 1, noise=1.5), drawn(20, 2, noise=1.5)
    settings = ProbeSettings(steps=30)
    hidden = test_masks.copy()
    hidden[:, :32] = 255
    scores = probe(train, train_masks, test, hidden, CLASSES, settings)
    other = test_masks.copy()
    other[:, :32] = 0
    assert scores != probe(train, train_masks, test, other, CLASSES, settings)
    hidden_train = train_masks.copy()
    hidden_train[:3] = 255  # whole images without a label must not give a NaN
    assert probe(train, hidden_train, test, test_masks, CLASSES, settings).mean_iou > 20


def test_confusion_counts_every_labelled_pixel_once():
    test, masks = drawn(5, 3)
    masks[0, :10] = 255

    class Constant(torch.nn.Module):
        def forward(self, patches, size):
            logits = torch.zeros(len(patches), 3, *size)
            logits[:, 2, :, size[1] // 2 :] = 1  # left half background, right half legs
            return logits

    counts = _confusion(Constant(), test, masks, 3)
    for true in range(3):
        for said, half in ((0, masks[:, :, :16]), (1, masks[:0]), (2, masks[:, :, 16:])):
            assert counts[true, said] == (half == true).sum()


def test_iou_by_hand_and_absent_classes_left_out():
    # true background 6 (4 right, 2 said legs), true torso 4 (1 right, 3 said background).
    confusion = np.array([[4, 0, 2], [3, 1, 0], [0, 0, 0]])
    scores = _scores(confusion, CLASSES)
    assert scores.iou == pytest.approx({"background": 100 * 4 / 9, "torso": 100 * 1 / 4})
    assert scores.mean_iou == pytest.approx(100 * (4 / 9 + 1 / 4) / 2)
    assert scores.pixel_accuracy == pytest.approx(50.0)


def test_a_mask_index_without_a_name_is_refused():
    train, test = drawn(4, 1), drawn(4, 2)
    test[1][0, 0, 0] = 3
    with pytest.raises(ValueError, match="mask index 3 has no name"):
        probe(*train, *test, CLASSES)


def test_test_masks_without_a_label_are_refused():
    train, (test, masks) = drawn(4, 1), drawn(4, 2)
    with pytest.raises(ValueError, match="no labelled pixel"):
        probe(*train, test, np.full_like(masks, 255), CLASSES, ProbeSettings(steps=1))


def test_features_without_patches_are_refused():
    (train, masks), test = drawn(4, 1), drawn(4, 2)
    with pytest.raises(ValueError, match="needs features with patches"):
        probe(train._replace(patches=None), masks, *test, CLASSES)
