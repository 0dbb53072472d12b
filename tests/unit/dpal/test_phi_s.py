"""PHI-S: a Hadamard of every width, unit variance per channel, exact inverse, kept error ratios."""

import re

import numpy as np
import pytest

from dpal.base.errors import ConfigError, DataError
from dpal.phi_s import PhiS, hadamard

BASES = (1, 12, 20, 28)


def correlated(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Tokens with a steep spectrum, an outlier channel and a mean far from 0, float64 [n, D]."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(width, width)) * np.arange(1, width + 1) ** -1.0
    tokens = rng.normal(size=(count, width)) @ spread.T + 7 * rng.normal(size=width)
    tokens[:, 3] *= 20
    return tokens


def fitted(tokens: np.ndarray) -> PhiS:
    return PhiS.fit(tokens.mean(0), np.cov(tokens, rowvar=False, bias=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("doublings", range(5))
def test_hadamard_is_orthonormal_with_entries_of_one_size(base: int, doublings: int) -> None:
    order = base * 2**doublings
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5, rtol=1e-12)


@pytest.mark.parametrize("order", [192, 256, 320, 384, 448, 640, 768, 1024, 1280, 1408, 1536])
def test_the_widths_of_known_backbones_have_a_hadamard(order: int) -> None:
    signs = np.rint(hadamard(order) * order**0.5)  # products of +-1 are exact in float64
    assert np.array_equal(signs @ signs.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 10, 50, 250, 770])
def test_a_width_without_hadamard_is_named(order: int) -> None:
    with pytest.raises(ConfigError, match=f"width {order} "):
        hadamard(order)


def test_a_refused_width_is_told_the_nearest_that_are_accepted() -> None:
    near = {}
    for order in range(3, 400):
        try:
            hadamard(order)
        except ConfigError as error:
            below, above = re.search(r"widths are (\d+) and (\d+);", str(error)).groups()  # type: ignore[union-attr]
            near[order] = int(below), int(above)
    known = [order for order in range(1, 512) if order not in near]
    for order, told in near.items():
        assert told == (max(n for n in known if n < order), min(n for n in known if n > order))
    assert near[382] == (380, 384)
    assert {36, 44, 60, 84} < set(known)  # 36 is no 2^k, 12 2^k, 20 2^k, nor 28 2^k


@pytest.mark.parametrize("width", [16, 24, 40, 56])
def test_every_channel_has_unit_variance_and_zero_mean(width: int) -> None:
    tokens = correlated(4000, width)
    turned = fitted(tokens).apply(tokens)
    np.testing.assert_allclose(turned.var(axis=0), 1, rtol=1e-9)
    np.testing.assert_allclose(turned.mean(axis=0), 0, atol=1e-9)
    assert tokens.var(axis=0).max() / tokens.var(axis=0).min() > 50


def test_the_inverse_is_exact_also_for_tokens_never_seen() -> None:
    transform, other = fitted(correlated(500, 24)), 100 * correlated(50, 24, seed=1)
    np.testing.assert_allclose(transform.invert(transform.apply(other)), other, rtol=1e-10)


def test_squared_errors_keep_their_ratio() -> None:
    tokens = correlated(500, 24)
    transform = fitted(tokens)
    guess = tokens + correlated(500, 24, seed=2)
    before = ((tokens - guess) ** 2).sum(axis=1)
    after = ((transform.apply(tokens) - transform.apply(guess)) ** 2).sum(axis=1)
    np.testing.assert_allclose(before / after, tokens.var(axis=0).mean(), rtol=1e-9)


def test_it_is_the_formula_of_the_paper() -> None:
    tokens = correlated(600, 12, seed=3)
    mean = tokens.sum(axis=0) / len(tokens)
    sigma = sum(np.outer(row - mean, row - mean) for row in tokens) / len(tokens)
    # SVD of the centred tokens instead of an eigendecomposition of the covariance.
    _, singular, axes = np.linalg.svd(tokens - mean, full_matrices=False)
    eigenvalues, axes = singular[::-1] ** 2 / len(tokens), axes[::-1]
    axes = np.array([row if max(row, key=abs) > 0 else -row for row in axes])
    expected = np.empty_like(tokens)
    for index, row in enumerate(tokens):
        expected[index] = hadamard(12) @ (axes @ (row - mean)) / np.sqrt(eigenvalues.mean())
    np.testing.assert_allclose(PhiS.fit(mean, sigma).apply(tokens), expected, atol=1e-8)


def test_a_covariance_of_low_rank_still_has_an_exact_inverse() -> None:
    tokens = correlated(6, 16)  # fewer tokens than channels
    transform = fitted(tokens)
    np.testing.assert_allclose(transform.invert(transform.apply(tokens)), tokens, rtol=1e-9)
    np.testing.assert_allclose(transform.apply(tokens).var(axis=0), 1, rtol=1e-9)


def test_rounding_below_zero_and_nonsense_in_a_covariance() -> None:
    mixed = np.diag([2.0, 2.0, -1e-12, 0.0])
    assert PhiS.fit(np.zeros(4), mixed).scale == pytest.approx(1.0)
    with pytest.raises(DataError, match="same token"):
        PhiS.fit(np.zeros(4), np.zeros((4, 4)))
    with pytest.raises(DataError, match="not finite"):
        PhiS.fit(np.zeros(4), np.full((4, 4), np.nan))
