"""TinyMIM (CVPR 2023): the last block of the student imitates one block's attention relations.

    R_qk = softmax(Q K^T / sqrt(d)),  R_vv = softmax(V V^T / sqrt(d))       [H, 1 + N, 1 + N]
    L    = mean_{H,i} KL(R^t_i || R^s_i)                for qk and for vv

1 + N tokens; only the N patches for a teacher without a CLS token.
The teacher's queries, keys and values are not stored. They are recomputed from what the cache
holds anyway: the input of the teacher's block goes through its frozen first norm and projection.
No colour noise reaches the teacher, as in the reference.

Source: TinyMIM reference, `models_tinymim.py`, `models_teacher.py`.
Legend: B samples, N patches, H heads, d width of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpal import objective
from dpal.alignment import Alignment, AlignmentTask
from dpal.base.errors import ConfigError
from dpal.base.methods import TinyMim
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.model.attention import suit_attention
from dpal.target_source import Targets, TargetSource
from dpal.targets.header import TargetHeader
from dpal.task import Moment


class Relations(NamedTuple):
    """Queries, keys and values of one block, each [B, H, 1 + N, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Projection(Protocol):
    """A teacher block's frozen norm and qkv projection (`dpal.model.relation_target`)."""

    heads: int
    has_cls: bool

    def to(self, device: torch.device) -> "Projection":
        """Move the weights and return self."""
        ...

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class TinyMimTask(AlignmentTask):
    """Student whose last block has as many heads as the teacher's.

    Args:
        projections: the frozen norm and projection of every teacher's block.

    Raises:
        ConfigError: when the student is no ViT, or differs from a teacher in its number of heads.
    """

    terms = ("loss", "qk", "vv")

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[TargetSource],
        projections: Sequence[Projection],
    ) -> None:
        assert isinstance(recipe.method, TinyMim)
        if recipe.student.family != "vit":
            raise ConfigError(
                f"student.name={recipe.student.name}: TinyMIM compares attention relations; "
                "accepted are vit_tiny, vit_small and vit_base"
            )
        for frozen in projections:
            if frozen.heads != recipe.student.last_heads:
                raise ConfigError(
                    f"student.last_heads={recipe.student.last_heads}: TinyMIM compares head by "
                    f"head, and the teacher has {frozen.heads}; accepted is that number"
                )
        self.weights = recipe.method
        self._projections = tuple(projections)  # a tuple, so nn.Module does not look inside
        super().__init__(recipe, sources)
        self._freeze_what_relations_do_not_reach()

    def head(self, header: TargetHeader) -> nn.Module:
        return nn.Identity()  # relations have no width, so nothing has to be projected

    def _freeze_what_relations_do_not_reach(self) -> None:
        """Behind the last block's projection nothing gets a gradient; nothing shall decay it."""
        last = self.student.blocks[-1]
        for part in (last.attn.proj, last.norm2, last.mlp, last.ls1, last.ls2, self.student.norm):
            part.requires_grad_(False)

    def look(self, batch: TrainBatch, moment: Moment) -> Relations:
        suit_attention(self.student, self.device)
        pixels = self.pixels(batch.base, batch.photometric[:, 0])
        with self.paths(batch.keys, moment, 0):
            last = self.student.last_attention(pixels)
        return Relations(last.q, last.k, last.v)

    def align(
        self, teacher: int, seen: Relations, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        # Raw, in every target space: the frozen projection was trained on the block's own input.
        tokens = torch.cat([raw.base.cls.unsqueeze(1), raw.base.patches], dim=1)
        projection = self._projections[teacher].to(self.device)
        if not projection.has_cls:  # the mean of the patches is none of the block's tokens
            tokens, seen = tokens[:, 1:], Relations(*(part[:, :, 1:] for part in seen))
        with torch.autocast(self.device.type, enabled=False):
            frozen = Relations(*projection(tokens))
            qk = objective.divergence(
                objective.attention_relation(seen.q, seen.k),
                objective.attention_relation(frozen.q, frozen.k),
            )
            vv = objective.divergence(
                objective.attention_relation(seen.v, seen.v),
                objective.attention_relation(frozen.v, frozen.v),
            )
        aligned = self.weights.qk * qk + self.weights.vv * vv
        terms = [qk.detach().mean(), vv.detach().mean()]
        return Alignment(aligned, torch.zeros_like(aligned[0]), terms, {})
