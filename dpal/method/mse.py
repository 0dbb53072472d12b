"""Plain feature distillation: the student's tokens, linearly projected, against the teacher's.

    L = w_g mean_D (h_g(c_s) - c_t)^2 + w_l mean_{N,D} (h_l(P_s) - P_t)^2

with h = LayerNorm and linear layer. The floor that every other method has to beat.

Legend: B samples, N patches, D teacher width.
"""

import torch
from torch import nn

from dpal import objective
from dpal.alignment import Alignment, AlignmentTask
from dpal.base.methods import Mse
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.model.attention import suit_attention
from dpal.model.static_decoder import projection
from dpal.model.tokens import Tokens
from dpal.target_source import Targets, TargetSource
from dpal.targets.header import TargetHeader
from dpal.task import Moment


class MseTask(AlignmentTask):
    """Student and two projections per teacher under mean squared error."""

    terms = ("loss", "identity", "shape")

    def __init__(self, recipe: Recipe, sources: tuple[TargetSource, ...]) -> None:
        assert isinstance(recipe.method, Mse)
        self.weights = recipe.method
        super().__init__(recipe, sources)

    def head(self, header: TargetHeader) -> nn.Module:
        width = self.student.embed_dim
        return nn.ModuleDict(
            {name: projection(width, header.width) for name in ("identity", "shape")}
        )

    def look(self, batch: TrainBatch, moment: Moment) -> Tokens:
        suit_attention(self.student, self.device)
        with self.paths(batch.keys, moment, 0):
            tokens: Tokens = self.student(self.pixels(batch.base, batch.photometric[:, 0]))
        return tokens

    def align(
        self, teacher: int, seen: Tokens, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        heads = self.decoder[teacher]
        identity = objective.mse(heads["identity"](seen.cls), targets.base.cls)
        shape = objective.mse(heads["shape"](seen.patches), targets.base.patches)
        aligned = self.weights.identity * identity + self.weights.shape * shape
        terms = [identity.detach().mean(), shape.detach().mean()]
        return Alignment(aligned, torch.zeros_like(aligned[0]), terms, {})
