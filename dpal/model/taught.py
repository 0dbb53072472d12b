"""A ViT that is taught on labels: identity and attributes on its CLS token, parts and attributes on
its patch tokens.

All heads are thrown away afterwards; what is kept is the ViT, read after its final norm.

Legend: B views, N patches, D width, P parts, A attributes, S labels along one side of a patch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.students import PATCH
from dpal.base.teachers import TaughtTeacher
from dpal.model.timm_import import timm

LABEL_STRIDE = 4  # one part label for 4 x 4 pixels
COSINE_SCALE = 16.0
LABEL_SMOOTHING = 0.1
METRIC_TEMPERATURE = 0.1
ATTRIBUTE_WEIGHT = 3.0
POSITION_STD = 0.5


class Trait(NamedTuple):
    """An attribute to be taught: its number of values and the parts it can be seen on."""

    num_values: int
    parts: tuple[int, ...]


class Labels(NamedTuple):
    """What is known of a batch.

    Attributes:
        identities: class of each view [B].
        attributes: value of every attribute [B, A].
        parts: part of every 4 x 4 pixels [B, h / 4, w / 4].
    """

    identities: Tensor
    attributes: Tensor
    parts: Tensor


class TaughtLosses(NamedTuple):
    """The terms of teaching, each a scalar; `attributes` are said by CLS, `local` by patches."""

    identity: Tensor
    metric: Tensor
    parts: Tensor
    attributes: Tensor
    local: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        said = self.attributes + self.local
        return self.identity + self.metric + self.parts + ATTRIBUTE_WEIGHT * said


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
    """The ViT with its heads and its losses.

    Args:
        arch: see `arch_of`.
        num_identities: classes of the identity head.
        num_parts: P, background included.
        traits: one for each attribute.
    """

    def __init__(
        self,
        arch: dict[str, Any],
        num_identities: int,
        num_parts: int,
        traits: tuple[Trait, ...],
    ) -> None:
        super().__init__()
        self.vit = build_taught(arch)
        # Embedded patches have about unit variance at the start: positions of the usual 0.02
        # would be inaudible beside them, and parts are learned several times more slowly.
        nn.init.normal_(self.vit.pos_embed, std=POSITION_STD)
        width, self.num_parts, self.traits = int(arch["embed_dim"]), num_parts, traits
        self.identities = nn.Parameter(torch.randn(num_identities, width) * 0.02)
        self.parts = nn.Linear(width, (PATCH // LABEL_STRIDE) ** 2 * num_parts)
        self.global_attributes = nn.Linear(width, sum(trait.num_values for trait in traits))
        self.local_attributes = nn.Linear(width, sum(trait.num_values for trait in traits))

    def forward(self, planes: Tensor, labels: Labels) -> TaughtLosses:
        """Losses of normalised views [B, 3, h, w]."""
        tokens = self.vit.forward_features(planes).float()  # [B, 1 + N, D]
        cls, patches = tokens[:, 0], tokens[:, 1:]
        unit = F.normalize(cls, dim=1)  # [B, D]
        logits = COSINE_SCALE * unit @ F.normalize(self.identities, dim=1).T
        parts = _per_patch(labels.parts)  # [B, N, S * S]
        scores = self.parts(patches).unflatten(2, (parts.shape[2], self.num_parts))
        said = self.global_attributes(cls)[:, None]
        everywhere = cls.new_ones(len(self.traits), len(cls), 1)
        return TaughtLosses(
            identity=F.cross_entropy(logits, labels.identities, label_smoothing=LABEL_SMOOTHING),
            metric=metric_loss(unit, labels.identities),
            parts=F.cross_entropy(scores.flatten(0, 2), parts.flatten()),
            attributes=self._attributes(said, labels.attributes, everywhere),
            local=self._attributes(
                self.local_attributes(patches), labels.attributes, self._visible(parts)
            ),
        )

    def _visible(self, parts: Tensor) -> Tensor:
        """Share of each patch that shows each attribute: [A, B, N]."""
        shares = F.one_hot(parts, self.num_parts).float().mean(2)  # [B, N, P]
        return torch.stack([shares[:, :, list(trait.parts)].sum(2) for trait in self.traits])

    def _attributes(self, said: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted cross-entropy of logits [B, N, values of all], weights [A, B, N]."""
        total = said.new_zeros(())
        sizes = [trait.num_values for trait in self.traits]
        for number, logits in enumerate(said.split(sizes, dim=2)):
            target = values[:, number, None].expand(logits.shape[:2])
            loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # [B, N]
            weight = weights[number]
            total = total + (loss * weight).sum() / (weight.sum() + 1)
        return total / len(sizes)


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
