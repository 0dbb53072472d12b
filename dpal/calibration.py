"""Fit what a cache shares: channel statistics, shape mask, turn of the codec, covariance.

Legend: M images, N patches, D teacher width.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpal.base.codec import parse_codec
from dpal.base.errors import DataError
from dpal.rotation import Rotation
from dpal.targets.header import TargetDefinition, TargetHeader

EPS = 1e-3  # least deviation of a channel, as a share of the largest
PERCENTILES = (0.5, 99.5)  # of the calibration projections, mapped to mask 0 and 1


class Calibration(NamedTuple):
    """What is fitted on a calibration sample.

    Attributes:
        header: of the cache.
        covariance: of the patch tokens, float64 [D, D]; PHI-S is fitted on it.
    """

    header: TargetHeader
    covariance: np.ndarray


def fit_header(
    definition: TargetDefinition,
    cls: np.ndarray,
    patches: np.ndarray,
    keys: Sequence[str],
) -> TargetHeader:
    """The header alone of `fit_calibration`."""
    return fit_calibration(definition, cls, patches, keys).header


def fit_calibration(
    definition: TargetDefinition,
    cls: np.ndarray,
    patches: np.ndarray,
    keys: Sequence[str],
) -> Calibration:
    """Header and covariance fitted on the calibration sample's base views.

    Args:
        cls: float32 [M, D].
        patches: float32 [M, N, D], row-major on the base grid.
        keys: sample keys, in order [M].

    Raises:
        ConfigError: when the codec's rotation does not fit the teacher's width.
        DataError: when the teacher's tokens are not finite, or all the same.
    """
    codec = parse_codec(definition.codec)
    codec.require_width(patches.shape[-1])
    if not (np.isfinite(cls).all() and np.isfinite(patches).all()):
        raise DataError("the teacher gives tokens that are not finite on the calibration images")
    patch_mean, covariance = _moments(patches.reshape(-1, patches.shape[-1]))
    variance = np.diagonal(covariance)
    if not variance.max() > 0:
        raise DataError("the teacher gives the same token for every patch; check its weights")
    cls_mean, cls_std = cls.mean(0, dtype=np.float64), cls.std(0, dtype=np.float64)
    direction = np.linalg.eigh(covariance)[1][:, -1]  # [D], largest eigenvalue
    projection = patches.astype(np.float64) @ direction  # [M, N]
    if _centre_minus_border(projection.mean(0).reshape(definition.grid)) < 0:
        direction, projection = -direction, -projection
    low, high = np.percentile(projection, PERCENTILES)
    header = TargetHeader(
        definition=definition,
        width=patches.shape[-1],
        patch_mean=patch_mean.astype(np.float32),
        patch_std=_floor(np.sqrt(variance)),
        cls_mean=cls_mean.astype(np.float32),
        cls_std=_floor(cls_std),
        direction=direction.astype(np.float32),
        low=float(low),
        high=float(high),
        calibration_keys=hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        rotation=Rotation.fit(codec, patch_mean, covariance),
    )
    return Calibration(header, covariance)


def _moments(tokens: np.ndarray, chunk: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] in float64, in two passes over bounded chunks."""
    mean = tokens.mean(0, dtype=np.float64)
    covariance = np.zeros((tokens.shape[1],) * 2)
    for start in range(0, len(tokens), chunk):
        centred = tokens[start : start + chunk].astype(np.float64) - mean
        covariance += centred.T @ centred
    return mean, covariance / len(tokens)


def _centre_minus_border(field: np.ndarray) -> float:
    """Mean of the inner half of a map minus the mean of its border: persons are centred."""
    rows, columns = field.shape
    top, left = rows // 4, max(columns // 4, 1 if columns > 2 else 0)
    border = np.ones(field.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    return float(field[top : rows - top, left : columns - left].mean() - field[border].mean())


def _floor(std: np.ndarray) -> np.ndarray:
    """Keep a dead channel from dividing by zero, or its noise from eating a token's range."""
    return np.maximum(std, max(EPS * float(std.max()), 1e-12)).astype(np.float32)
