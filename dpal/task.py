"""The DPAL task: student, decoder and teacher targets turn a batch into losses.

One sample gives five decoder calls: identity from the base view and from each local crop, shape
from the base view, relation from the composite (method: 2).

Legend: B samples, C local crops, D teacher width, K = 3 patterns.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dpal import objective
from dpal.augment import add_noise
from dpal.base.recipe import Loss, Recipe
from dpal.batch import TrainBatch
from dpal.model.attention import suit_attention
from dpal.model.decoder import Decoded, DynamicPatternDecoder, Pattern
from dpal.model.student import build_student, normalise_planes, planes_of
from dpal.model.tokens import FrozenBackbone, Tokens
from dpal.targets import TargetHeader, decode_batch, shape_mask, standardise

TERMS = ("loss", "identity", "shape", "relation", "router", "expert")


class Losses(NamedTuple):
    """Result of one micro-batch.

    Attributes:
        total: weighted sum, with gradient.
        terms: detached values in the order of `TERMS` [6]; unweighted except for the sum.
        routing: mean router probability [K, K]; row: called pattern, column: expert.
    """

    total: Tensor
    terms: Tensor
    routing: Tensor


class Targets(NamedTuple):
    """What the teacher says about a batch: tokens of base views and of composites."""

    base: Tokens
    composite: Tokens


class TargetSource(Protocol):
    """Where targets come from; the task cannot tell a cache from a teacher."""

    header: TargetHeader

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets: ...


class CachedTargets:
    """Targets dequantised from the records that came with the batch."""

    def __init__(self, header: TargetHeader) -> None:
        self.header = header

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        return Targets(
            decode_batch(batch.base_records, self.header, "view", device),
            decode_batch(batch.composite_records, self.header, "composite", device),
        )


class OnlineTargets:
    """Targets computed by the teacher from the batch's own (noise-free) pixels."""

    def __init__(self, teacher: FrozenBackbone, header: TargetHeader) -> None:
        self.teacher, self.header = teacher, header

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        views = (torch.from_numpy(batch.base), torch.from_numpy(batch.composite))
        # Cloned, because autograd may not save a tensor that was made in inference mode.
        base, composite = (
            Tokens(*(tensor.to(device).clone() for tensor in self.teacher(view))) for view in views
        )
        return Targets(base, composite)


class DpalTask(nn.Module):
    """Student and decoder under the three alignment losses.

    Args:
        recipe: student, decoder, loss weights and seed are read from it.
        targets: teacher targets; not a sub-module, so the engine neither trains nor shards it.
    """

    def __init__(self, recipe: Recipe, targets: TargetSource) -> None:
        super().__init__()
        width = targets.header.width
        self.student = build_student(recipe.student, recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            self.decoder = DynamicPatternDecoder(self.student.embed_dim, width, recipe.decoder)
        self.weights: Loss = recipe.loss
        self.shrink = recipe.views.height // recipe.student.height
        self._targets = (targets,)  # in a tuple, so nn.Module does not look inside

    def forward(self, batch: TrainBatch, router_weight: float) -> Losses:
        """Losses of one micro-batch; `router_weight` follows the schedule of the reference."""
        device = self.student.cls_token.device
        targets = self._targets[0](batch, device)
        mask = self._mask(targets.base.patches)
        if self.weights.targets == "standardised":
            header = self._targets[0].header
            targets = Targets(*(standardise(tokens, header) for tokens in targets))
        decoded, patterns = self._decode(batch, device)
        with torch.autocast(device.type, enabled=False):
            return self._losses(decoded, patterns, targets, mask, router_weight)

    def _decode(
        self, batch: TrainBatch, device: torch.device
    ) -> tuple[list[Decoded], list[Pattern]]:
        """Decoded tokens and pattern of each call: base, crops, base's patches, composite.

        What has the same shape goes through the student, and through the decoder, at once.
        """
        suit_attention(self.student, device)
        base, composite, crops = self._views(batch, device)
        seen = self.student(base)
        whole = torch.cat(self._with_cls(self.student(composite)), dim=1)
        vectors = torch.cat([seen.cls, self.student(crops).cls])  # [(1 + C) B, d]
        identities = _split(self.decoder(vectors.unsqueeze(1)), 1 + batch.crops.shape[1])
        others = [self.decoder(seen.patches), self.decoder(whole)]
        patterns = [Pattern.IDENTITY] * len(identities) + [Pattern.SHAPE, Pattern.RELATION]
        return identities + others, patterns

    def _views(self, batch: TrainBatch, device: torch.device) -> list[Tensor]:
        """Noisy, normalised pixels: float [B, 3, h, w] of base views, then of composites.

        Last, all crops: first crop 0 of every sample, then crop 1 ... [C B, 3, h, w].
        """
        crops = np.swapaxes(batch.crops, 0, 1).reshape(-1, *batch.crops.shape[2:])
        noise = batch.photometric  # [B, V, 6]
        crop_noise = np.swapaxes(noise[:, 2:], 0, 1).reshape(-1, noise.shape[2])
        views = ((batch.base, noise[:, 0]), (batch.composite, noise[:, 1]), (crops, crop_noise))
        return [self._pixels(pixels, rows, device) for pixels, rows in views]

    def _pixels(self, pixels: np.ndarray, noise: np.ndarray, device: torch.device) -> Tensor:
        planes = planes_of(torch.from_numpy(pixels).to(device))
        noisy = add_noise(planes, torch.from_numpy(noise).to(device))
        return normalise_planes(noisy, self.shrink)

    def _mask(self, patches: Tensor) -> Tensor:
        if self.weights.shape_mask == "none":
            return patches.new_ones(*patches.shape[:2], 1)
        return shape_mask(patches, self._targets[0].header)

    def _losses(
        self,
        decoded: list[Decoded],
        patterns: list[Pattern],
        targets: Targets,
        mask: Tensor,
        router_weight: float,
    ) -> Losses:
        *identity, shape, relation = decoded
        weights = self.weights
        logits = [call.router_logits for call in decoded]
        terms = (
            objective.identity_loss([y.tokens.squeeze(1) for y in identity], targets.base.cls),
            objective.shape_loss(shape.tokens, targets.base.patches, mask),
            objective.relation_loss(
                relation.tokens, torch.cat(self._with_cls(targets.composite), dim=1)
            ),
            objective.router_loss(logits, patterns),
            objective.expert_penalty([call.expert_energy for call in decoded]),
        )
        factors = (
            weights.identity,
            weights.shape,
            weights.relation,
            router_weight,
            weights.expert,
        )
        total = torch.stack([factor * t for factor, t in zip(factors, terms, strict=True)]).sum()
        return Losses(total, torch.stack([total, *terms]).detach(), routing(logits, patterns))

    @staticmethod
    def _with_cls(tokens: Tokens) -> tuple[Tensor, Tensor]:
        return tokens.cls.unsqueeze(1), tokens.patches


def _split(decoded: Decoded, calls: int) -> list[Decoded]:
    """Undo a concatenation of equally large calls."""
    return [Decoded(*parts) for parts in zip(*(t.chunk(calls) for t in decoded), strict=True)]


def routing(logits: list[Tensor], patterns: list[Pattern]) -> Tensor:
    """Mean router probability [K, K] by called pattern (row)."""
    table = logits[0].new_zeros(len(Pattern), len(Pattern), dtype=torch.float32)
    for z, pattern in zip(logits, patterns, strict=True):
        share = patterns.count(pattern)
        table[pattern] += z.detach().float().softmax(dim=-1).mean(dim=0) / share
    return table
