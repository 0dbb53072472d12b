"""The space that a student is compared with its teacher in: raw, standardised, or PHI-S.

Records hold the teacher's own tokens; a space is applied to them afterwards, so that runs in all
three spaces share one cache.

    raw            y = x                                  the reference; a final norm's unit scale
    standardised   y = (x - mean) / std                   per channel
    phi-s          y = R (x - mean) / scale               see `dpal.phi_s`

In PHI-S, CLS tokens are turned by the patch tokens' R, around their own mean and with their own
single scale. A calibration sample has fewer CLS tokens than channels, so a rotation fitted on them
would be noise in most directions; their mean variance is a sum over all channels and is known
well. What the method promises holds for them too: any rotation and one scale keep the ratios of
errors, and R spreads whatever variance CLS tokens share with patches.

Legend: B samples, N patches, D teacher width.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpal.model.tokens import Tokens
from dpal.phi_s import PhiS
from dpal.targets.header import TargetHeader

SpaceName = Literal["raw", "standardised", "phi-s"]


class Affine(NamedTuple):
    """y = ((x - mean) / scale) R^T; `rotation` None stands for the identity.

    Attributes:
        mean: float32 [D].
        scale: float32 [D] or [1].
        rotation: float32 [D, D].
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor | None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] in the space, float32 also under autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            plain = (tokens.float() - self.mean) / self.scale
            return plain if self.rotation is None else plain @ self.rotation.T


class TargetSpace:
    """Turns a teacher's tokens into what the student learns; made by `target_space`.

    Args:
        maps: of CLS and of patch tokens; None leaves both as they are.
    """

    def __init__(self, maps: tuple[Affine, Affine] | None) -> None:
        self._maps = maps

    def __call__(self, tokens: Tokens) -> Tokens:
        """CLS [B, D] and patches [B, N, D] in the space; raw tokens come back as they are."""
        if self._maps is None:
            return tokens
        if self._maps[0].mean.device != tokens.cls.device:  # once, at the first batch
            self._maps = (_moved(self._maps[0], tokens.cls), _moved(self._maps[1], tokens.cls))
        cls, patches = self._maps
        return Tokens(cls(tokens.cls), patches(tokens.patches))


def target_space(
    name: SpaceName, header: TargetHeader, covariance: np.ndarray | None = None
) -> TargetSpace:
    """The space that `loss.targets` names, fitted with the statistics of a cache.

    Args:
        covariance: of the patch tokens, float64 [D, D]; `phi-s` alone needs it.

    Raises:
        ConfigError: PHI-S of a width without Hadamard matrix.
        DataError: PHI-S of a covariance that is zero or not finite.
    """
    if name == "raw":
        return TargetSpace(None)
    if name == "standardised":
        cls = _affine(header.cls_mean, header.cls_std)
        return TargetSpace((cls, _affine(header.patch_mean, header.patch_std)))
    assert covariance is not None, "the caller reads the covariance that phi-s needs"
    fitted = PhiS.fit(header.patch_mean, covariance)
    cls_scale = np.sqrt(np.square(header.cls_std, dtype=np.float64).mean(keepdims=True))
    cls = _affine(header.cls_mean, cls_scale, fitted.rotation)
    patches = _affine(header.patch_mean, np.array([fitted.scale]), fitted.rotation)
    return TargetSpace((cls, patches))


def _affine(mean: np.ndarray, scale: np.ndarray, rotation: np.ndarray | None = None) -> Affine:
    turn = None if rotation is None else torch.from_numpy(rotation.astype(np.float32))
    centre, spread = (torch.from_numpy(part.astype(np.float32)) for part in (mean, scale))
    return Affine(centre, spread, turn)


def _moved(affine: Affine, like: Tensor) -> Affine:
    mean, scale, rotation = affine
    turned = None if rotation is None else rotation.to(like.device)
    return Affine(mean.to(like.device), scale.to(like.device), turned)
