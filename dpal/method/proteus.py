"""Proteus (ICLR 2025): token, feature and masked-patch terms, each through a head of its own.

    L_token   = MSE(h_tok(c_s), c_t)
    L_feature = MSE([h_tok(c_s); h_fea(P_s)], [c_t; P_t])      1 + N rows averaged together
    L_patch   = MSE(h_patch(P_s^masked)[m], P_t[m])            masked patches m

The teacher sees the whole view. The reference masks exactly half of every batch; here a masked
image is an image's own choice in every step, of the same probability p, so that it does not depend
on the batch an image is in. Its patch term is divided by p, which is the reference's mean over
masked patches when exactly the share p is masked.

Source: Proteus reference, `pretrain/models_proteus_dinov2.py`.
Legend: B samples, b masked samples, N patches, D teacher width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpal import objective
from dpal.alignment import Alignment, AlignmentTask
from dpal.base.methods import Proteus
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.chance import generator
from dpal.model.attention import suit_attention
from dpal.model.static_decoder import projection
from dpal.model.tokens import Tokens
from dpal.target_source import Targets, TargetSource
from dpal.targets.header import TargetHeader
from dpal.task import Moment


class Seen(NamedTuple):
    """Student tokens of one batch.

    Attributes:
        whole: tokens of the base views.
        masked: patch tokens of the masked images' masked views [b, N, d].
        mask: masked patches, bool [B, N]; rows without any are the images left whole.
        rows: which images `masked` is of, bool [B].
    """

    whole: Tokens
    masked: Tensor
    mask: Tensor
    rows: Tensor


class ProteusTask(AlignmentTask):
    """Student and three heads per teacher."""

    terms = ("loss", "token", "feature", "patch")

    def __init__(self, recipe: Recipe, sources: tuple[TargetSource, ...]) -> None:
        assert isinstance(recipe.method, Proteus)
        self.spec = recipe.method
        super().__init__(recipe, sources, masked=True)

    def head(self, header: TargetHeader) -> nn.Module:
        width = self.student.embed_dim
        return nn.ModuleDict(
            {name: projection(width, header.width) for name in ("token", "feature", "patch")}
        )

    def look(self, batch: TrainBatch, moment: Moment) -> Seen:
        suit_attention(self.student, self.device)
        pixels = self.pixels(batch.base, batch.photometric[:, 0])
        with self.paths(batch.keys, moment, 0):
            whole = self.student(pixels)
        num_patches = whole.patches.shape[1]
        mask = np.stack([self._mask(key, moment.step, num_patches) for key in batch.keys])
        rows = mask.any(axis=1)
        rows[0] |= not rows.any()  # never an empty forward; without a mask it counts nothing
        keys = [key for key, row in zip(batch.keys, rows, strict=True) if row]
        chosen, taken = (torch.from_numpy(array).to(self.device) for array in (mask, rows))
        with self.paths(keys, moment, 1):
            masked = self.student(pixels[taken], chosen[taken]).patches
        return Seen(whole, masked, chosen, taken)

    def align(
        self, teacher: int, seen: Seen, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        heads, base = self.decoder[teacher], targets.base
        cls = heads["token"](seen.whole.cls)
        patches = heads["feature"](seen.whole.patches)
        token = objective.mse(cls, base.cls)
        feature = objective.mse(
            torch.cat([cls.unsqueeze(1), patches], dim=1),
            torch.cat([base.cls.unsqueeze(1), base.patches], dim=1),
        )
        of_masked = objective.masked_patch_loss(
            heads["patch"](seen.masked), base.patches[seen.rows], seen.mask[seen.rows]
        )
        patch = torch.zeros_like(token)
        patch[seen.rows] = of_masked / self.spec.mask_probability
        weights = (self.spec.token, self.spec.feature, self.spec.patch)
        terms = (token, feature, patch)
        aligned = torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum(dim=0)
        means = [term.detach().mean() for term in terms]
        return Alignment(aligned, torch.zeros_like(aligned[0]), means, {})

    def _mask(self, key: str, step: int, num_patches: int) -> np.ndarray:
        """Masked patches of one image in one step, bool [N]."""
        rng = generator(self.seed, "proteus-mask", key, step)
        mask = np.zeros(num_patches, dtype=bool)
        if rng.random() < self.spec.mask_probability:
            count = max(1, round(self.spec.mask_ratio * num_patches))
            mask[rng.permutation(num_patches)[:count]] = True
        return mask
