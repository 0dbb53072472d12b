"""DPAL: three alignment levels, each decoded from the student's tokens by D-PaDe.

With every level in use, one sample gives five decoder calls: identity from the base view and from
each of two local crops, shape from the base view, relation from the composite (method: 2). A level
of weight 0 is not computed, and its views are not rendered. With `loss.crop_patches` the shape of
every local crop is compared too, with the tokens that RoIAlign cuts out of the base view's target;
the shape term is then the mean over base view and crops.

Legend: B samples, C local crops, N patches of the base view, n of a crop, D teacher width,
K patterns, M instances of a scene.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpal import objective
from dpal.alignment import Alignment, AlignmentTask
from dpal.base.losses import Loss
from dpal.base.recipe import Recipe
from dpal.batch import Needs, TrainBatch
from dpal.model.attention import suit_attention
from dpal.model.decoder import Decoded, Pattern
from dpal.model.static_decoder import build_decoder
from dpal.model.tokens import Tokens
from dpal.shape_mask import mask_of
from dpal.target_source import Targets, TargetSource
from dpal.targets.header import TargetHeader
from dpal.task import Moment


class Instances(NamedTuple):
    """Padded boxes of persons: left, top, right, bottom [B, M, 4] and their number [B]."""

    corners: Tensor
    counts: Tensor


class Crops(NamedTuple):
    """Local crops whose patch tokens are compared.

    Attributes:
        patches: tokens of each crop, first crop 0 of every sample [C B, n, d].
        regions: where they lie in the base view, see `TrainBatch` [B, C, 4].
        grid: rows and columns of their tokens.
    """

    patches: Tensor
    regions: Tensor
    grid: tuple[int, int]


class Seen(NamedTuple):
    """Student tokens of one batch; what only a level of weight 0 would need is not computed.

    Attributes:
        identities: CLS of the base view, then of each crop, [(1 + C) B, d].
        shape: patch tokens of the base view [B, N, d].
        crops: None unless their patches are compared.
        relation: CLS and patch tokens of the composite [B, 1 + N', d].
        instances: boxes of the persons in the composite; None unless they are related.
    """

    identities: Tensor | None
    shape: Tensor | None
    crops: Crops | None
    relation: Tensor | None
    instances: Instances | None


class DpalTask(AlignmentTask):
    """Student and one decoder per teacher under the three alignment losses."""

    terms = ("loss", "identity", "shape", "relation", "router", "expert")

    def __init__(self, recipe: Recipe, sources: tuple[TargetSource, ...]) -> None:
        self.weights: Loss = recipe.loss
        self._recipe = recipe
        self._by_instance = self.weights.relation_level == "instances"
        super().__init__(recipe, sources)

    @property
    def needs(self) -> Needs:
        return Needs(
            crops=self.weights.identity > 0 or self.weights.crop_patches,
            composite=self.weights.relation > 0,
            boxes=self._by_instance,
        )

    def head(self, header: TargetHeader) -> nn.Module:
        return build_decoder(self.student.embed_dim, header.width, self._recipe.decoder)

    def look(self, batch: TrainBatch, moment: Moment) -> Seen:
        """Student tokens; what has the same shape goes through the student at once."""
        suit_attention(self.student, self.device)
        identities = shape = parts = relation = instances = None
        noise = batch.photometric  # [B, V, 6]
        if self.weights.identity or self.weights.shape:
            with self.paths(batch.keys, moment, 0):
                seen = self.student(self.pixels(batch.base, noise[:, 0]))
            shape, identities = seen.patches, seen.cls
        if self.weights.relation:
            with self.paths(batch.keys, moment, 1):
                composite = self.student(self.pixels(batch.composite, noise[:, 1]))
            relation = _with_cls(composite)
            if self._by_instance:
                assert batch.boxes is not None
                on_device = (torch.from_numpy(part).to(self.device) for part in batch.boxes)
                instances = Instances(*on_device)
        if self.needs.crops:
            # First crop 0 of every sample, then crop 1 ...
            crops = batch.crops.swapaxes(0, 1).reshape(-1, *batch.crops.shape[2:])
            rows = np.swapaxes(noise[:, 2:], 0, 1).reshape(-1, noise.shape[2])
            with self.paths(batch.keys, moment, 2, copies=batch.crops.shape[1]):
                pixels = self.pixels(crops, rows)
                close = self.student(pixels)
            if self.weights.identity:
                identities = torch.cat([identities, close.cls])
            if self.weights.crop_patches:
                regions = torch.from_numpy(batch.regions).to(self.device)
                parts = Crops(close.patches, regions, self.student.grid_of(*pixels.shape[2:]))
        return Seen(identities, shape, parts, relation, instances)

    def align(
        self, teacher: int, seen: Seen, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        calls, patterns = self._decode(self.decoder[teacher], seen, len(raw.base.cls))
        header, mask = self._sources[teacher].header, None
        if self.weights.shape:
            mask = mask_of(self.weights.shape_mask, raw.base.patches, header)
        with torch.autocast(self.device.type, enabled=False):
            shapes = [(targets.base.patches, mask)]
            if seen.crops is not None:
                tokens, masks = (
                    objective.region_features(
                        whole, seen.crops.regions, header.definition.grid, seen.crops.grid
                    ).unbind(1)
                    for whole in shapes[0]
                )
                shapes += zip(tokens, masks, strict=True)
            return self._compare(calls, patterns, targets, shapes, moment, seen.instances)

    def _decode(
        self, decoder: nn.Module, seen: Seen, size: int
    ) -> tuple[list[Decoded], list[Pattern]]:
        """Every decoder call and its pattern."""
        calls: list[Decoded] = []
        patterns: list[Pattern] = []
        if self.weights.identity:
            assert seen.identities is not None
            vectors = decoder(seen.identities.unsqueeze(1), Pattern.IDENTITY)
            calls += _split(vectors, len(seen.identities) // size)
            patterns += [Pattern.IDENTITY] * len(calls)
        if self.weights.shape:
            calls.append(decoder(seen.shape, Pattern.SHAPE))
            patterns.append(Pattern.SHAPE)
        if seen.crops is not None:
            parts = decoder(seen.crops.patches, Pattern.SHAPE)
            count = seen.crops.regions.shape[1]
            calls += _split(parts, count)
            patterns += [Pattern.SHAPE] * count
        if self.weights.relation:
            calls.append(decoder(seen.relation, Pattern.RELATION))
            patterns.append(Pattern.RELATION)
        return calls, patterns

    def _compare(
        self,
        calls: list[Decoded],
        patterns: list[Pattern],
        targets: Targets,
        shapes: list[tuple[Tensor, Tensor | None]],
        moment: Moment,
        instances: Instances | None,
    ) -> Alignment:
        weights = self.weights
        of = {p: [c for c, q in zip(calls, patterns, strict=True) if q == p] for p in Pattern}
        nothing = targets.base.cls.new_zeros(len(targets.base.cls))  # [B]
        identity = shape = relation = router = expert = nothing
        if weights.identity:
            vectors = [call.tokens.squeeze(1) for call in of[Pattern.IDENTITY]]
            identity = objective.identity_loss(vectors, targets.base.cls)
        if weights.shape:
            views = zip(of[Pattern.SHAPE], shapes, strict=True)
            terms_of_views = [objective.shape_loss(y.tokens, t, m) for y, (t, m) in views]
            shape = torch.stack(terms_of_views).mean(dim=0)
        if weights.relation:
            assert targets.composite is not None
            tokens = of[Pattern.RELATION][0].tokens
            relation = self._relation(tokens, targets.composite, instances)
        diagnostics = {}
        if calls[0].routing is not None:
            logits = [call.routing.logits for call in calls]
            router = objective.router_loss(logits, patterns)
            expert = objective.expert_penalty([call.routing.energy for call in calls])
            diagnostics = routing_diagnostics(calls, patterns)
        aligned = weights.identity * identity + weights.shape * shape + weights.relation * relation
        late = moment.step >= moment.steps(weights.router_switch)
        router_weight = weights.router_late if late else weights.router
        steering = (router_weight * router + weights.expert * expert).mean()
        terms = [term.detach().mean() for term in (identity, shape, relation, router, expert)]
        return Alignment(aligned, steering, terms, diagnostics)

    def _relation(self, decoded: Tensor, target: Tokens, instances: Instances | None) -> Tensor:
        """Relation term [B] of all tokens of a composite, or of the persons in a scene."""
        if instances is None:
            stable = self.weights.affinity == "log_softmax"
            return objective.relation_loss(decoded, _with_cls(target), stable)
        side = self._recipe.views.height
        student, teacher = (
            objective.instance_features(patches, instances.corners, side)  # [B, M, D]
            for patches in (decoded[:, 1:], target.patches)
        )
        return objective.instance_relation_loss(student, teacher, instances.counts)


def routing_diagnostics(calls: list[Decoded], patterns: list[Pattern]) -> dict[str, Tensor]:
    """What the router and the experts do.

    `routing` [K, K]: mean router probability; row: called pattern, column: expert.
    `router_entropy` []: mean entropy of the router's choice in nats; ln K is undecided.
    `expert_similarity` []: mean cosine similarity between two experts of an image.
    """
    with torch.no_grad():
        parts = [call.routing for call in calls]
        size = parts[0].logits.shape[1]
        table = parts[0].logits.new_zeros(size, size, dtype=torch.float32)
        entropies = []
        for part, pattern in zip(parts, patterns, strict=True):
            logs = part.logits.float().log_softmax(dim=-1)  # [B, K]
            table[pattern] += logs.exp().mean(dim=0) / patterns.count(pattern)
            entropies.append(-(logs.exp() * logs).sum(dim=-1).mean())
        similarity = torch.stack([part.similarity for part in parts]).mean()
        return {
            "routing": table,
            "router_entropy": torch.stack(entropies).mean(),
            "expert_similarity": similarity,
        }


def _with_cls(tokens: Tokens) -> Tensor:
    return torch.cat([tokens.cls.unsqueeze(1), tokens.patches], dim=1)


def _split(decoded: Decoded, calls: int) -> list[Decoded]:
    """Undo a concatenation of equally large calls."""
    tokens = decoded.tokens.chunk(calls)
    if decoded.routing is None:
        return [Decoded(part, None) for part in tokens]
    logits, energy = (part.chunk(calls) for part in decoded.routing[:2])
    return [
        Decoded(t, decoded.routing._replace(logits=z, energy=e))
        for t, z, e in zip(tokens, logits, energy, strict=True)
    ]
