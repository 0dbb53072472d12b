"""The turn of a codec: patch tokens as r numbers of about unit variance, and back.

    z = (x - mean) B^T / scale          x = mean + scale z B          B [r, D], B B^T = I

One single scale, scale^2 = mean kept variance, so a squared error in z is the squared error in x
divided by one number: no direction is favoured. What B leaves out is lost, and no more than that.

`phis` is PHI-S (`dpal.phi_s`). `pca<r>` keeps the r strongest principal components, mixed: the
first would otherwise decide the step of all numbers that share its scale, which doubles int4's
error. The mix is an orthonormal cosine matrix, because there is one for every r:

    B = C^T U_r      C_ki = sqrt((2 - [k = 0]) / r) cos(pi (2 i + 1) k / (2 r)),  i, k < r

with the components in the rows of U_r, the strongest first. Source: DCT-II (Ahmed, Natarajan and
Rao, 1974).

Legend: D teacher width, r numbers that are stored of a token. Nothing here imports torch.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpal.base.codec import Codec
from dpal.base.errors import DataError
from dpal.phi_s import PhiS, require_hadamard


@dataclass(frozen=True, eq=False)
class Rotation:
    """A fitted turn; `mean` is the header's mean of the patch tokens.

    Attributes:
        basis: B, orthonormal rows, float32 [r, D].
        scale: the one number that every turned channel is divided by.
        kept: share of the calibration sample's variance that B keeps, 0 to 1.
    """

    basis: np.ndarray
    scale: float
    kept: float

    @staticmethod
    def fit(codec: Codec, mean: np.ndarray, covariance: np.ndarray) -> "Rotation | None":
        """The turn that a codec asks for, fitted in float64; None for a codec without.

        Each eigenvector is signed so that its entry of largest magnitude is positive.

        Args:
            mean: of the patch tokens [D].
            covariance: of the patch tokens [D, D].

        Raises:
            ConfigError: when the codec does not fit the teacher's width.
            DataError: when the kept components do not vary.
        """
        require_width(codec, len(mean))
        if codec.turn == "none":
            return None
        if codec.turn == "phis":
            fitted = PhiS.fit(mean, covariance)
            return Rotation(fitted.rotation.astype(np.float32), fitted.scale, 1.0)
        values, axes = np.linalg.eigh((covariance + covariance.T) / 2)  # ascending
        values = values.clip(min=0)
        strongest, axes = values[::-1][: codec.rank], axes[:, ::-1][:, : codec.rank]  # [r], [D, r]
        scale = float(np.sqrt(strongest.mean()))
        if not scale > 0:
            raise DataError("the teacher gives the same token for every patch; check its weights")
        largest = axes[np.abs(axes).argmax(axis=0), np.arange(codec.rank)]
        basis = cosines(codec.rank).T @ (axes * np.where(largest < 0, -1.0, 1.0)).T  # [r, D]
        kept = float(strongest.sum() / values.sum())
        return Rotation(basis.astype(np.float32), scale, kept)

    def apply(self, tokens: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """z of tokens float32 [..., D]: float32 [..., r]."""
        turned: np.ndarray = (tokens - mean) @ self.basis.T / np.float32(self.scale)
        return turned

    def to_plain(self) -> dict[str, Any]:
        """For JSON: the basis row by row as base64 of little-endian float32, 5.3 r D bytes."""
        data = self.basis.astype("<f4").tobytes()
        return {
            "rank": len(self.basis),
            "basis": base64.b64encode(data).decode(),
            "sha256": hashlib.sha256(data).hexdigest(),
            "scale": self.scale,
            "kept": self.kept,
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any], codec: Codec, width: int) -> "Rotation":
        """Read what `to_plain` wrote. Raises ValueError, TypeError or KeyError when damaged."""
        if codec.turn == "none":
            raise ValueError(f"rotation: {codec.word} has none")
        rank = codec.channels(width)
        data = base64.b64decode(plain["basis"], validate=True)
        if plain["rank"] != rank or len(data) != 4 * rank * width:
            raise ValueError(f"rotation: {codec.word} of {width} channels has {rank} rows")
        if hashlib.sha256(data).hexdigest() != plain["sha256"]:
            raise ValueError("rotation: the basis does not match its checksum")
        scale, kept = float(plain["scale"]), float(plain["kept"])
        if not (0 < scale < float("inf") and 0 < kept <= 1 + 1e-9):
            raise ValueError(f"rotation: scale {scale}, kept {kept}")
        basis = np.frombuffer(data, dtype="<f4").reshape(rank, width).astype(np.float32)
        return Rotation(basis, scale, kept)


def require_width(codec: Codec, width: int) -> None:
    """Raise ConfigError when a codec does not fit a teacher of `width` channels."""
    codec.require_width(width)
    if codec.turn == "phis":
        require_hadamard(width, f"cache.codec={codec.word}", "a codec without phis-")


def cosines(order: int) -> np.ndarray:
    """C, orthonormal, float64 [r, r]: row k is a cosine of k half waves."""
    waves, places = np.arange(order)[:, None], np.arange(order)
    plain: np.ndarray = np.cos(np.pi * waves * (2 * places + 1) / (2 * order))
    plain *= np.sqrt(2 / order)
    plain[0] /= np.sqrt(2)
    return plain
