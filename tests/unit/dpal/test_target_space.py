"""Target spaces: raw, standardised and PHI-S tokens, restated in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpal.base.errors import ConfigError
from dpal.calibration import Calibration, fit_calibration
from dpal.model.tokens import Tokens
from dpal.target_space import target_space

from made_targets import DEFINITION, GRID

WIDTH = 24


def tokens(count: int, seed: int = 0, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """CLS [M, D] and patches [M, N, D]: correlated channels, one outlier, means far from 0."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(width, width))
    patches = rng.normal(size=(count, GRID[0] * GRID[1], width)) @ mixing + 3
    patches[..., 5] *= 30
    cls = 4 * rng.normal(size=(count, width)) @ mixing - 1
    return cls.astype(np.float32), patches.astype(np.float32)


def fitted(count: int = 16, width: int = WIDTH) -> Calibration:
    return fit_calibration(DEFINITION, *tokens(count, width=width), ["k"] * count)


def in_space(name: str, fit: Calibration, cls: np.ndarray, patches: np.ndarray) -> Tokens:
    space = target_space(name, fit.header, fit.covariance)
    return space(Tokens(torch.from_numpy(cls), torch.from_numpy(patches)))


def test_raw_tokens_are_the_teachers_own() -> None:
    cls, patches = tokens(3, seed=1)
    seen = in_space("raw", fitted(), cls, patches)
    assert np.array_equal(seen.cls.numpy(), cls)
    assert np.array_equal(seen.patches.numpy(), patches)


def test_standardised_tokens_have_unit_variance_in_every_channel() -> None:
    cls, patches = tokens(16)
    seen = in_space("standardised", fitted(), cls, patches)
    flat = patches.reshape(-1, WIDTH).astype(np.float64)
    expected = (flat - flat.mean(0)) / flat.std(0)
    np.testing.assert_allclose(seen.patches.reshape(-1, WIDTH).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(seen.cls.numpy().std(axis=0), 1, rtol=1e-4)


def test_phi_s_gives_patches_unit_variance_in_every_channel() -> None:
    seen = in_space("phi-s", fitted(), *tokens(16)).patches.reshape(-1, WIDTH).double()
    np.testing.assert_allclose(seen.var(0, correction=0), 1, rtol=1e-4)
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)


def test_phi_s_keeps_the_ratio_of_errors_of_patches_and_of_cls() -> None:
    fit, (cls, patches), (other_cls, other) = fitted(), tokens(5, seed=1), tokens(5, seed=2)
    ours, theirs = in_space("phi-s", fit, cls, patches), in_space("phi-s", fit, other_cls, other)
    calibrated = tokens(16)
    for before, after, sample in (
        (patches - other, ours.patches - theirs.patches, calibrated[1]),
        (cls - other_cls, ours.cls - theirs.cls, calibrated[0]),
    ):
        ratio = (before.astype(np.float64) ** 2).sum(-1) / (after.numpy() ** 2).sum(-1)
        variance = sample.reshape(-1, WIDTH).astype(np.float64).var(axis=0)
        np.testing.assert_allclose(ratio, variance.mean(), rtol=2e-4)


def test_phi_s_gives_cls_unit_mean_variance_and_turns_them_as_it_turns_patches() -> None:
    fit = fitted()
    cls, patches = tokens(16)
    seen = in_space("phi-s", fit, cls, patches)
    assert float(seen.cls.double().var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)
    # Least squares recovers one map from each kind of token; they differ by a factor only.
    centred = patches.reshape(-1, WIDTH).astype(np.float64)
    of_patches = np.linalg.lstsq(
        centred - centred.mean(0), seen.patches.reshape(-1, WIDTH).double().numpy(), rcond=None
    )[0]
    own = (cls - cls.mean(0, dtype=np.float64)) @ of_patches
    ratio = own / seen.cls.double().numpy()
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-2)


def test_autocast_does_not_round_a_target() -> None:
    cls, patches = tokens(4, seed=1)
    plain = in_space("phi-s", fitted(), cls, patches)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = in_space("phi-s", fitted(), cls, patches)
    assert torch.equal(plain.patches, mixed.patches)
    assert mixed.cls.dtype == torch.float32


def test_phi_s_of_a_width_without_hadamard_is_refused_by_name() -> None:
    fit = fitted(width=18)
    with pytest.raises(ConfigError, match="width 18 "):
        target_space("phi-s", fit.header, fit.covariance)


def test_the_covariance_does_not_change_the_address_of_a_cache() -> None:
    fit = fitted()
    assert fit.header.digest == DEFINITION.digest != replace(DEFINITION, codec="fp16").digest
    flat = tokens(16)[1].reshape(-1, WIDTH).astype(np.float64)
    expected = sum(np.outer(row, row) for row in flat - flat.mean(0)) / len(flat)
    np.testing.assert_allclose(fit.covariance, expected, rtol=1e-9, atol=1e-9)
