"""A ViT that is taught on labels: identity on its CLS token, parts on its patch tokens.

Both heads are thrown away afterwards; what is kept is the ViT, read after its final norm.

Legend: B views, N patches, D width, P parts, S labels along one side of a patch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.recipe import PATCH, TaughtTeacher
from dpal.model.timm_import import timm

LABEL_STRIDE = 4  # one part label for 4 x 4 pixels
COSINE_SCALE = 16.0
LABEL_SMOOTHING = 0.1
METRIC_TEMPERATURE = 0.1


class TaughtLosses(NamedTuple):
    """The three terms of teaching, each a scalar; `total` is their sum."""

    identity: Tensor
    metric: Tensor
    parts: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.identity + self.metric + self.parts


def arch_of(spec: TaughtTeacher, view_size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer, as JSON values."""
    return {
        "img_size": list(view_size),
        "patch_size": PATCH,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "num_classes": 0,
        "global_pool": "token",
    }


def build_taught(arch: dict[str, Any]) -> nn.Module:
    """The bare ViT of `arch` (see `arch_of`); it takes any input size."""
    sized = {**arch, "img_size": tuple(arch["img_size"]), "dynamic_img_size": True}
    vit: nn.Module = timm.models.vision_transformer.VisionTransformer(**sized)
    return vit


class Taught(nn.Module):
    """The ViT with its two heads and its losses.

    Args:
        arch: see `arch_of`.
        num_identities: classes of the identity head.
        num_parts: P, background included.
    """

    def __init__(self, arch: dict[str, Any], num_identities: int, num_parts: int) -> None:
        super().__init__()
        self.vit = build_taught(arch)
        width, self.num_parts = int(arch["embed_dim"]), num_parts
        self.identities = nn.Parameter(torch.randn(num_identities, width) * 0.02)
        self.parts = nn.Linear(width, (PATCH // LABEL_STRIDE) ** 2 * num_parts)

    def forward(self, planes: Tensor, identities: Tensor, parts: Tensor) -> TaughtLosses:
        """Losses of a batch.

        Args:
            planes: normalised views [B, 3, h, w].
            identities: class of each view [B].
            parts: part of every 4 x 4 pixels [B, h / 4, w / 4].
        """
        tokens = self.vit.forward_features(planes).float()  # [B, 1 + N, D]
        cls = F.normalize(tokens[:, 0], dim=1)  # [B, D]
        logits = COSINE_SCALE * cls @ F.normalize(self.identities, dim=1).T
        identity = F.cross_entropy(logits, identities, label_smoothing=LABEL_SMOOTHING)
        labels = _per_patch(parts)  # [B, N, S * S]
        scores = self.parts(tokens[:, 1:]).unflatten(2, (labels.shape[2], self.num_parts))
        shape = F.cross_entropy(scores.flatten(0, 2), labels.flatten())
        return TaughtLosses(identity, metric_loss(cls, identities), shape)


def metric_loss(cls: Tensor, identities: Tensor) -> Tensor:
    """Supervised contrastive loss over a batch of unit vectors [B, D].

    Views without another view of their identity in the batch are left out.
    Source: Khosla et al. 2020, equation 2 (L_out).
    """
    itself = torch.eye(len(cls), dtype=torch.bool, device=cls.device)
    logits = (cls @ cls.T / METRIC_TEMPERATURE).masked_fill(itself, float("-inf"))
    log_probability = logits.log_softmax(dim=1).masked_fill(itself, 0.0)
    same = (identities[:, None] == identities[None, :]) & ~itself
    counts = same.sum(1)
    per_view = -(log_probability * same).sum(1) / counts.clamp(min=1)
    return per_view[counts > 0].mean() if bool((counts > 0).any()) else per_view.sum() * 0.0


def _per_patch(parts: Tensor) -> Tensor:
    """[B, h / 4, w / 4] regrouped by patch: [B, N, S * S]."""
    side = PATCH // LABEL_STRIDE
    batch, rows, columns = parts.shape
    grid = parts.reshape(batch, rows // side, side, columns // side, side)
    return grid.transpose(2, 3).reshape(batch, -1, side * side)
