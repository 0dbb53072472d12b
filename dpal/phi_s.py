"""PHI-S: teacher tokens turned so that every channel has unit variance under one single scale.

A Hadamard rotation of the principal axes spreads the variance evenly over the channels. Unlike
per-channel standardisation it keeps every ratio of errors: a student's squared error in the new
space is its error in the teacher's own space, divided by one number.

Legend: D channels, n = matrix order. Nothing here imports torch.
Source: PHI-S (arXiv 2410.01680); Hadamard matrices after Sylvester and Paley.
"""

from dataclasses import dataclass

import numpy as np

from dpal.base.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class PhiS:
    """The fitted transform y = (x - mean) R^T / scale and its exact inverse.

    Attributes:
        mean: mu, of the tokens it was fitted on, float64 [D].
        rotation: R = H U^T, orthogonal, float64 [D, D].
        scale: sqrt(mean eigenvalue), the one number that every channel is divided by.
    """

    mean: np.ndarray
    rotation: np.ndarray
    scale: float

    @staticmethod
    def fit(mean: np.ndarray, covariance: np.ndarray) -> "PhiS":
        """Fit in float64: Sigma = U diag(lambda) U^T, R = H U^T, scale^2 = mean(lambda).

        Negative eigenvalues (rounding) count as 0. The sign of each eigenvector is fixed: its
        entry of largest magnitude is positive.

        Args:
            mean: [D].
            covariance: symmetric [D, D].

        Raises:
            ConfigError: when no Hadamard matrix of order D is known here.
            DataError: when the covariance is not finite, or zero.
        """
        matrix = np.asarray(covariance, dtype=np.float64)
        assert matrix.shape == (len(mean),) * 2, matrix.shape
        if not np.isfinite(matrix).all():
            raise DataError("the covariance of the teacher's patch tokens is not finite")
        mixing = hadamard(len(mean))
        values, axes = np.linalg.eigh((matrix + matrix.T) / 2)  # [D], [D, D], axes in columns
        scale = float(np.sqrt(values.clip(min=0).mean()))
        if not scale > 0:
            raise DataError("the teacher gives the same token for every patch; check its weights")
        strongest = axes[np.abs(axes).argmax(axis=0), np.arange(len(axes))]
        axes = axes * np.where(strongest < 0, -1.0, 1.0)
        return PhiS(np.asarray(mean, dtype=np.float64), mixing @ axes.T, scale)

    def apply(self, tokens: np.ndarray) -> np.ndarray:
        """y = lambda^-1/2 H U^T (x - mu), float64 in and out [..., D]."""
        turned: np.ndarray = (tokens - self.mean) @ self.rotation.T / self.scale
        return turned

    def invert(self, turned: np.ndarray) -> np.ndarray:
        """x = mu + lambda^1/2 U H^T y, the exact inverse [..., D]."""
        tokens: np.ndarray = self.mean + self.scale * (turned @ self.rotation)
        return tokens


def hadamard(order: int) -> np.ndarray:
    """An orthonormal Hadamard matrix: entries +-1/sqrt(n), H H^T = I, float64 [n, n].

    Sylvester's doubling of the smallest known base: order 1, or a Paley matrix whose order is four
    times an odd number (12, 20, 28, 36, 44, ...). Other widths are refused by the nearest known.

    Raises:
        ConfigError: naming the width, when no such base divides it by a power of two.
    """
    require_hadamard(order, "loss.targets=phi-s", "loss.targets=standardised")
    base = _smallest_base(order)
    if base == 1:
        signs = np.ones((1, 1))
    else:
        signs = _paley_one(base - 1) if _is_prime(base - 1) else _paley_two(base // 2 - 1)
    while len(signs) < order:
        signs = np.block([[signs, signs], [signs, -signs]])
    plain: np.ndarray = signs / np.sqrt(order)
    return plain


def require_hadamard(order: int, setting: str, instead: str) -> None:
    """Raise ConfigError when no Hadamard matrix of the width `order` is known here.

    Args:
        setting: that asks for one, as key=value.
        instead: a setting that does not.
    """
    if _smallest_base(order):
        return
    below = next(n for n in range(order, 0, -1) if _smallest_base(n))
    above = next(n for n in range(order, 2 * order) if _smallest_base(n))  # at most the next 2^k
    raise ConfigError(
        f"{setting}: no Hadamard matrix of the teacher's width {order} is known here; the nearest "
        f"accepted widths are {below} and {above}; accepted for this one is {instead}"
    )


def _smallest_base(order: int) -> int:
    """Order of the smallest known matrix that doubles to `order`; 0 when there is none."""
    found = 0
    while order >= 1:
        if order == 1 or (order % 4 == 0 and _is_paley(order)):
            found = order
        if order % 2:
            break
        order //= 2
    return found


def _is_paley(order: int) -> bool:
    """Whether one of Paley's two constructions gives a matrix of `order`, a multiple of 4."""
    half = order // 2 - 1  # 4 divides the order, so order - 1 is 3 modulo 4
    return _is_prime(order - 1) or (half % 4 == 1 and _is_prime(half))


def _paley_one(prime: int) -> np.ndarray:
    """Order q + 1 for a prime q = 3 mod 4: I + S, with S skew and built of residues mod q."""
    skew = np.zeros((prime + 1,) * 2)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _residues(prime)
    return skew + np.eye(prime + 1)


def _paley_two(prime: int) -> np.ndarray:
    """Order 2 (q + 1) for a prime q = 1 mod 4: a symmetric conference matrix, 2 by 2 blocks."""
    conference = np.zeros((prime + 1,) * 2)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _residues(prime)
    diagonal, other = np.array([[1, -1], [-1, -1]]), np.array([[1, 1], [1, -1]])
    return np.kron(np.eye(prime + 1), diagonal) + np.kron(conference, other)


def _residues(prime: int) -> np.ndarray:
    """Jacobsthal matrix [q, q]: 1 where i - j is a square mod q, -1 where it is not, 0 on i = j."""
    character = np.full(prime, -1.0)
    character[np.arange(1, prime) ** 2 % prime] = 1
    character[0] = 0
    rows = np.arange(prime)
    table: np.ndarray = character[(rows[:, None] - rows) % prime]
    return table


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
