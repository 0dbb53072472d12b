"""SAIP: self-supervised pretraining across scales, without a teacher (arXiv 2503.08201).

The student looks at two base views, eight small images and a masked enlargement; its moving
average (the expert) looks at the base views and at a scene with two pasted persons. Total loss
L_rep + L_att + L_csr + L_css,inst + L_css,roi (method: teachers and baselines, 1).

Legend: B samples, C local crops, K prototypes, D student width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.average import MovingAverage
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe
from dpal.base.saip import Saip, misfit
from dpal.base.students import PATCH
from dpal.model.attention import suit_attention
from dpal.model.student import VitStudent
from dpal.saip import csm, csr, css
from dpal.saip.batch import SaipBatch
from dpal.saip.encoder import Seen, see, see_all, see_middle
from dpal.saip.pixels import Inputs, network_inputs
from dpal.saip.views import ENLARGEMENT, rescaled_sizes, scaled_size
from dpal.task import Losses, Moment, Task


class SaipDecoder(nn.Module):
    """Everything of SAIP that is discarded afterwards: heads, decoders, expert, centre.

    The norm in the middle of the student is here too: the student that is kept is a plain ViT.
    """

    centre: Tensor

    def __init__(self, student: VitStudent, spec: Saip) -> None:
        super().__init__()
        width = student.embed_dim
        self.middle_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = csm.PrototypeHead(width, spec.hidden, spec.bottleneck, spec.prototypes)
        self.reconstruct = csr.ReconstructionDecoder(
            width,
            student.grid_of(*student.input_size),
            width=spec.decoder_width,
            depth=spec.decoder_depth,
            heads=spec.decoder_heads,
        )
        self.search = css.SearchDecoder(width, spec.decoder_width)
        followed = {"student": student, "middle_norm": self.middle_norm, "head": self.head}
        self.expert = nn.ModuleDict(
            {name: MovingAverage(network, spec.ema) for name, network in followed.items()}
        )
        self.register_buffer("centre", torch.zeros(spec.prototypes))

    def follow(self, student: VitStudent, momentum: float) -> None:
        """Move the expert towards the student by one step."""
        followed = {"student": student, "middle_norm": self.middle_norm, "head": self.head}
        for name, network in followed.items():
            self.expert[name].update(network, momentum)


class Expertise(NamedTuple):
    """What the expert says about a batch; no gradient.

    Attributes:
        logits: prototype cosines of g1, then g2 [2, B, K].
        qkv: last attention of the base views, g1 of every sample first [3, 2 B, H, T, d].
        scene: middle patch tokens of the scene [B, s * s, D].
    """

    logits: Tensor
    qkv: Tensor
    scene: Tensor


class SaipTask(Task):
    """Student, expert and the three cross-scale objectives.

    Every random choice is a function of (seed, purpose, sample key or nothing, step).

    Raises:
        ConfigError: see `misfit`.
    """

    terms = ("loss", "representation", "attention", "reconstruction", "instance", "region")

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.method, Saip)
        reason = misfit(recipe)
        if reason:
            raise ConfigError(reason)
        super().__init__(recipe)
        self.spec = recipe.method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            self.decoder = SaipDecoder(self.student, self.spec)
        self._seen_logits: list[Tensor] = []  # means [K] of this step's micro-batches

    def forward(self, batch: SaipBatch, moment: Moment) -> Losses:
        """Losses of one micro-batch."""
        for vit in self._transformers():
            suit_attention(vit, self.device)
        inputs = self._inputs(batch)
        expertise = self._ask_expert(inputs)
        seen, smalls = self._look(inputs, moment)
        per_image = (
            *self._match(seen, smalls, expertise),
            self._reconstruct(batch.keys, inputs, seen, moment),
            *self._search(batch, seen, smalls, expertise),
        )
        terms = [values.mean() for values in per_image]
        spec = self.spec
        weights = (
            spec.representation,
            spec.attention,
            spec.reconstruction,
            spec.instance,
            spec.region,
        )
        total = torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum()
        return Losses(
            total, torch.stack([total, *terms]).detach(), self._diagnostics(expertise, moment)
        )

    @torch.no_grad()
    def after_step(self, moment: Moment) -> None:
        """Move the expert and the centre; once a step, whatever its micro-batches."""
        super().after_step(moment)
        self.decoder.follow(self.student, expert_momentum(self.spec, moment))
        mean = torch.stack(self._seen_logits).mean(dim=0)
        self._seen_logits.clear()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.decoder.centre.copy_(csm.moved_centre(self.decoder.centre, mean))

    def _transformers(self) -> tuple[nn.Module, ...]:
        decoder = self.decoder
        return self.student, decoder.expert["student"].network, decoder.reconstruct, decoder.search

    def _inputs(self, batch: SaipBatch) -> Inputs:
        pixels = (batch.globals, batch.locals, batch.background, batch.corners)
        arrays = [torch.from_numpy(array).to(self.device) for array in pixels]
        # The noise stays on the CPU, see `augment.add_noise`.
        return network_inputs(*arrays, torch.from_numpy(batch.photometric))

    @torch.no_grad()
    def _ask_expert(self, inputs: Inputs) -> Expertise:
        student, norm, head = (
            self.decoder.expert[name].network for name in ("student", "middle_norm", "head")
        )
        seen = see(student, norm, inputs.globals)
        logits = head(seen.cls).unflatten(0, (2, -1))  # [2, B, K]
        if self.training:
            self._seen_logits.append(logits.mean(dim=(0, 1)))
        return Expertise(logits, seen.qkv, see_middle(student, norm, inputs.scene)[:, 1:])

    def _look(self, inputs: Inputs, moment: Moment) -> tuple[Seen, list[Seen]]:
        """The student on the base views, and on the small images in three parts.

        These are the plain local crops [(C - 1) B] (none if C = 1), the last local crop [B] and
        the region image [B], the last two rescaled (nearest, as in the reference).
        """
        size = len(inputs.scene)
        sizes = rescaled_sizes(self.seed, moment.step, tuple(inputs.smalls.shape[2:]))
        plain, *last = inputs.smalls.split([len(inputs.smalls) - 2 * size, size, size])
        last = [F.interpolate(v, size=s, mode="nearest") for v, s in zip(last, sizes, strict=True)]
        views = [inputs.globals, *last] if not len(plain) else [inputs.globals, *last, plain]
        seen, crop, region, *rest = see_all(self.student, self.decoder.middle_norm, views)
        return seen, [*rest, crop, region]

    def _match(self, seen: Seen, smalls: list[Seen], expertise: Expertise) -> tuple[Tensor, Tensor]:
        """CSM: the representation and the attention term, [B] each."""
        size = expertise.logits.shape[1]
        cls = torch.cat([part.cls for part in (seen, *smalls)])  # [V B, D]
        logits = self.decoder.head(cls).unflatten(0, (-1, size))  # [V, B, K]
        with torch.autocast(self.device.type, enabled=False):
            known = csm.expert_probabilities(expertise.logits, self.decoder.centre)
            attention = csm.attention_loss(seen.qkv, expertise.qkv)  # [2 B]
            return csm.representation_loss(logits, known), attention.view(2, size).mean(dim=0)

    def _reconstruct(
        self, keys: tuple[str, ...], inputs: Inputs, seen: Seen, moment: Moment
    ) -> Tensor:
        """CSR: pixels of the enlarged second view [B]."""
        second = inputs.globals[len(keys) :]
        size = scaled_size(tuple(second.shape[2:]), ENLARGEMENT)
        enlarged = F.interpolate(second, size=size, mode="nearest")
        anchor, grid = ((h // PATCH, w // PATCH) for h, w in (second.shape[2:], size))
        ratio = self.spec.mask_ratio
        masks = csr.draw_masks(self.seed, keys, moment.step, anchor, grid, ratio)
        visible, scored = (torch.from_numpy(part).to(self.device) for part in masks)
        tokens = see_middle(self.student, self.decoder.middle_norm, enlarged, visible)
        first = seen.middle[: len(keys), 0]
        predicted = self.decoder.reconstruct(tokens, first, visible, grid[0] * grid[1])
        with torch.autocast(self.device.type, enabled=False):
            return csr.reconstruction_loss(predicted, csr.normalised_patches(enlarged), scored)

    def _search(
        self, batch: SaipBatch, seen: Seen, smalls: list[Seen], expertise: Expertise
    ) -> tuple[Tensor, Tensor]:
        """CSS: find the region image by g1, and the last local crop by itself, [B] each."""
        search, size = self.decoder.search, len(batch.keys)
        scene, side = search.look(expertise.scene), batch.background.shape[1] // PATCH
        corners = torch.from_numpy(batch.corners).to(self.device)
        queries = ((seen.middle[:size], corners[:, 1]), (smalls[-2].middle, corners[:, 0]))
        box = batch.locals.shape[2:4]
        instance, region = (
            css.search_loss(search(query, scene), css.search_mask(where, box, side))
            for query, where in queries
        )
        return instance, region

    @torch.no_grad()
    def _diagnostics(self, expertise: Expertise, moment: Moment) -> dict[str, Tensor]:
        """How far from collapse the expert is.

        `expert_entropy` []: mean entropy of its choices in nats; 0 or ln K for good is a collapse.
        `expert_spread` []: entropy of the mean choice of the batch; 0 is one prototype for all.
        `expert_momentum` []: of the moving average.
        """
        known = csm.expert_probabilities(expertise.logits, self.decoder.centre)
        momentum = known.new_tensor(expert_momentum(self.spec, moment))
        return {
            "expert_entropy": torch.special.entr(known).sum(dim=-1).mean(),
            "expert_spread": torch.special.entr(known.mean(dim=(0, 1))).sum(),
            "expert_momentum": momentum,
        }


def expert_momentum(spec: Saip, moment: Moment) -> float:
    """Momentum of the expert at a step: half a cosine from `spec.ema` to 1 over the whole run.

    m = 1 - (1 - m_0) (1 + cos(pi s / S)) / 2 with S the steps of the run; s is the step of the
    run, or, with `ema_schedule: epoch` (reference, line 321), the step inside the epoch.
    """
    step = moment.step
    if spec.ema_schedule == "epoch":
        step %= max(1, moment.steps("1 epochs"))
    share = 0.5 * (1 + math.cos(math.pi * min(step / max(moment.total_steps, 1), 1.0)))
    return 1 - (1 - spec.ema) * share
