"""D-PaDe, the dynamic pattern decoder: per image, it writes the linear map it then decodes with.

Three learned pattern queries read the student's tokens and become three expert matrices E_k; a
router mixes them into one matrix per image; the (self-attended) tokens times that matrix are the
decoded tokens, as wide as the teacher's. Used in pretraining only.

Source: reference `pretrain_moe_decoder.py`, final version.
Legend: B images, N tokens, d student width, D teacher width, K = 3 patterns.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpal.base.recipe import Decoder as DecoderSpec
from dpal.model.attention import attend
from dpal.model.mixing import MixingNorm


class Pattern(IntEnum):
    """What a call decodes; the value is the router's label."""

    IDENTITY = 0  # global identity: the CLS token alone
    SHAPE = 1  # local shape: the patch tokens of the base view
    RELATION = 2  # multi-person interaction: CLS and patch tokens of the composite


class Decoded(NamedTuple):
    """Result of one decoder call.

    Attributes:
        tokens: decoded tokens Y [B, N, D].
        router_logits: z [B, K].
        expert_energy: squared Frobenius norm of each image's mixed expert [B].
    """

    tokens: Tensor
    router_logits: Tensor
    expert_energy: Tensor


EXPERT_DIVISOR = 256  # keeps GELU near its linear range and the expert penalty near 0.05
REDUCED_WIDTH = 192  # students wider than ViT-S are reduced to this before decoding
WIDEST_UNREDUCED = 384


class Attention(nn.Module):
    """Multi-head attention of queries [B, M, d] over a context [B, N, d]; no norm, no residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend: [B, M, d]."""
        q = self._split(self.q(queries))  # [B, heads, M, d / heads]
        k, v = (self._split(part) for part in self.kv(context).chunk(2, dim=-1))
        attended = attend(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DynamicPatternDecoder(nn.Module):
    """D-PaDe (method: 1.3).

    Args:
        student_width: width of the student's tokens.
        teacher_width: width D of the decoded tokens.
        spec: the `decoder` section of a recipe.
    """

    def __init__(self, student_width: int, teacher_width: int, spec: DecoderSpec) -> None:
        super().__init__()
        self.reduce: nn.Module = nn.Identity()
        width = student_width
        if student_width > WIDEST_UNREDUCED:
            width = REDUCED_WIDTH
            self.reduce = nn.Sequential(
                nn.Linear(student_width, width), nn.GELU(), nn.LayerNorm(width)
            )
        self.width, self.teacher_width, patterns = width, teacher_width, len(Pattern)

        self.token_attention = Attention(width, heads=16)
        self.token_norm = nn.LayerNorm(width)

        self.router_query = nn.Parameter(torch.randn(1, 1, width))
        self.router_norm = nn.LayerNorm(width)
        self.router_attention = Attention(width, heads=12)
        self.router = nn.Linear(width, patterns, bias=False)

        self.pattern_queries = nn.Parameter(torch.zeros(1, patterns, width))
        self.query_attention = Attention(width, heads=16)
        self.query_norm = nn.LayerNorm(width)
        self.pattern_attention = Attention(width, heads=16)
        self.generator_norm = nn.LayerNorm(width)
        self.generator = nn.Linear(width, width * teacher_width)
        self.expert_norm = MixingNorm(width * teacher_width)
        self.output_norm = nn.LayerNorm(teacher_width)
        self._initialise(spec)

    def forward(self, tokens: Tensor) -> Decoded:
        """Decode student tokens X [B, N, d] of one pattern."""
        tokens = self.reduce(tokens)
        encoded = self.token_norm(tokens + self.token_attention(tokens, tokens))  # [B, N, d]
        logits = self._route(encoded)  # [B, K]
        mixed = self._mix(self._experts(tokens), logits.softmax(dim=-1))  # [B, d, D]
        decoded = self.output_norm(F.gelu(encoded @ mixed))  # [B, N, D]
        return Decoded(decoded, logits, mixed.float().square().sum(dim=(1, 2)))

    def _route(self, encoded: Tensor) -> Tensor:
        query = self.router_norm(self.router_query).expand(encoded.shape[0], -1, -1)
        return self.router(self.router_attention(query, encoded)).squeeze(1)

    def _experts(self, tokens: Tensor) -> Tensor:
        """Raw rows of the three experts [B, K, d * D]; `expert_norm` makes experts of them."""
        queries = self.pattern_queries.expand(tokens.shape[0], -1, -1)  # [B, K, d]
        queries = queries + self.query_attention(queries, queries)
        queries = queries + self.pattern_attention(self.query_norm(queries), tokens)
        return self.generator(self.generator_norm(queries))

    def _mix(self, experts: Tensor, probabilities: Tensor) -> Tensor:
        mixed = self.expert_norm(experts, probabilities / EXPERT_DIVISOR)  # [B, d * D]
        return mixed.unflatten(1, (self.width, self.teacher_width))

    def _initialise(self, spec: DecoderSpec) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.router.weight, a=5**0.5)
        if spec.query_init == "normal":
            nn.init.normal_(self.pattern_queries, std=0.02)
