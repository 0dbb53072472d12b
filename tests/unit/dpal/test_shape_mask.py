"""Shape masks: the per-batch mask is scikit-learn's, the fixed one does not know its batch."""

import numpy as np
import pytest
import torch

from dpal.calibration import fit_header
from dpal.shape_mask import batch_mask, mask_of
from dpal.targets.header import TargetHeader

from made_targets import DEFINITION, GRID

WIDTH = 20


def patches(count: int, seed: int = 0) -> np.ndarray:
    """Tokens with a person in the middle of every image, float32 [B, N, D]."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(count, *GRID, WIDTH))
    tokens[:, 2:6, 1:3, 4:9] += 6
    return tokens.reshape(count, -1, WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def header() -> TargetHeader:
    cls = np.random.default_rng(1).normal(size=(12, WIDTH)).astype(np.float32)
    return fit_header(DEFINITION, cls, patches(12), ["k"] * 12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_person_is_bright_whatever_sign_the_eigenvector_has(sign: int) -> None:
    cls = np.random.default_rng(1).normal(size=(12, WIDTH)).astype(np.float32)
    fitted = fit_header(DEFINITION, cls, sign * patches(12), ["k"] * 12)
    tokens = torch.from_numpy(sign * patches(6, seed=4))
    mask = mask_of("fixed", tokens, fitted).view(6, *GRID)
    assert mask[:, 2:6, 1:3].mean() > 0.7
    assert mask[:, 0].mean() < 0.3
    assert mask.min() >= 0
    assert mask.max() <= 1


def pca_mask(tokens: np.ndarray) -> np.ndarray:
    """PCA by SVD in float64, the loading of largest magnitude positive, min-max of the batch."""
    flat = tokens.reshape(-1, WIDTH).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    axis = np.linalg.svd(flat, full_matrices=False)[2][0]
    if axis[np.argmax(np.abs(axis))] < 0:
        axis = -axis
    projection = flat @ axis
    scaled = (projection - projection.min()) / (projection.max() - projection.min())
    return scaled.reshape(*tokens.shape[:2], 1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_of_a_batch_is_its_first_component(
    seed: int, sign: int, header: TargetHeader
) -> None:
    tokens = sign * patches(5, seed)
    mask = mask_of("per-batch", torch.from_numpy(tokens), header)
    np.testing.assert_allclose(mask.numpy(), pca_mask(tokens), atol=1e-4)
    assert (float(mask.min()), float(mask.max())) == (0.0, 1.0)


def test_a_channel_decides_whether_the_person_of_a_batch_is_bright() -> None:
    bright = batch_mask(torch.from_numpy(patches(5))).view(5, *GRID)
    dark = batch_mask(torch.from_numpy(-patches(5))).view(5, *GRID)
    assert bright[:, 2:6, 1:3].mean() > 0.7
    assert dark[:, 2:6, 1:3].mean() < 0.3


def test_tokens_that_are_all_the_same_get_no_weight_and_no_nan() -> None:
    assert torch.equal(batch_mask(torch.ones(2, 32, WIDTH)), torch.zeros(2, 32, 1))


def test_the_fixed_mask_is_the_clamped_projection_on_the_headers_basis(
    header: TargetHeader,
) -> None:
    tokens = patches(6, seed=4)
    projection = tokens.astype(np.float64) @ header.direction.astype(np.float64)
    expected = np.clip((projection - header.low) / (header.high - header.low), 0, 1)[..., None]
    mask = mask_of("fixed", torch.from_numpy(tokens), header)
    np.testing.assert_allclose(mask.numpy(), expected, atol=1e-5)
    assert torch.equal(mask_of("fixed", torch.from_numpy(tokens[2:3]), header), mask[2:3])


def test_flipped_weighs_the_background_and_none_weighs_all_alike(header: TargetHeader) -> None:
    tokens = torch.from_numpy(patches(6, seed=4))
    fixed, flipped = (mask_of(kind, tokens, header) for kind in ("fixed", "flipped"))
    assert torch.equal(fixed + flipped, torch.ones(6, 32, 1))
    assert flipped.view(6, *GRID)[:, 2:6, 1:3].mean() < 0.3
    assert torch.equal(mask_of("none", tokens, header), torch.ones(6, 32, 1))


@pytest.mark.parametrize("kind", ["fixed", "per-batch"])
def test_autocast_does_not_round_a_mask(kind: str, header: TargetHeader) -> None:
    tokens = torch.from_numpy(patches(6, seed=4))
    plain = mask_of(kind, tokens, header)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mask_of(kind, tokens, header), plain)
