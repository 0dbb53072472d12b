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

from dpal.base.losses import Decoder as DecoderSpec
from dpal.model.attention import attend
from dpal.model.mixing import MixingNorm
from dpal.model.start_values import xavier


class Pattern(IntEnum):
    """What a call decodes; the value is the router's label."""

    IDENTITY = 0  # global identity: the CLS token alone
    SHAPE = 1  # local shape: the patch tokens of the base view
    RELATION = 2  # multi-person interaction: CLS and patch tokens of the composite


class Routing(NamedTuple):
    """What the router and the experts did in one call.

    Attributes:
        logits: z [B, K].
        energy: squared Frobenius norm of each image's mixed expert [B].
        similarity: mean cosine between two different experts of the first image [], detached.
    """

    logits: Tensor
    energy: Tensor
    similarity: Tensor


class Decoded(NamedTuple):
    """Result of one decoder call.

    Attributes:
        tokens: decoded tokens Y [B, N, D].
        routing: None for decoders without experts.
    """

    tokens: Tensor
    routing: Routing | None


EXPERT_DIVISOR = 256  # keeps GELU near its linear range and the expert penalty near 0.05
REDUCED_WIDTH = 192  # students wider than ViT-S are reduced to this before decoding
WIDEST_UNREDUCED = 384
HEADS_DIVIDE = 48  # 12 and 16 heads divide its multiples; another width is reduced, too


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
        self.reduce, width = reduction(student_width)
        self.width, self.teacher_width, patterns = width, teacher_width, spec.patterns
        self.top_1 = spec.routing == "top-1"

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

    def forward(self, tokens: Tensor, pattern: Pattern) -> Decoded:
        """Decode student tokens X [B, N, d]; which pattern they are of, the router finds out."""
        tokens = self.reduce(tokens)
        encoded = self.token_norm(tokens + self.token_attention(tokens, tokens))  # [B, N, d]
        logits = self._route(encoded)  # [B, K]
        raw = self._experts(tokens)  # [B, K, d * D]
        mixed = self._mix(raw, self._shares(logits))  # [B, d, D]
        decoded = self.output_norm(F.gelu(encoded @ mixed))  # [B, N, D]
        energy = mixed.float().square().sum(dim=(1, 2))
        return Decoded(decoded, Routing(logits, energy, self._similarity(raw)))

    def _route(self, encoded: Tensor) -> Tensor:
        query = self.router_norm(self.router_query).expand(encoded.shape[0], -1, -1)
        return self.router(self.router_attention(query, encoded)).squeeze(1)

    def _shares(self, logits: Tensor) -> Tensor:
        """Part of each expert in the mixture [B, K]: soft, or the likeliest one alone.

        Top-1 keeps that expert's probability as its factor, so that the router still learns.
        """
        shares = logits.softmax(dim=-1)
        if not self.top_1:
            return shares
        best = shares.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(shares).scatter(1, best, shares.gather(1, best))

    @torch.no_grad()
    def _similarity(self, raw: Tensor) -> Tensor:
        """Mean cosine between two different experts of the first image [], without gradient."""
        norm = self.expert_norm
        experts = F.layer_norm(
            F.gelu(raw[0].to(norm.weight.dtype)),
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
        )
        unit = F.normalize(experts, dim=1)
        patterns = len(unit)
        return ((unit @ unit.T).sum() - patterns) / (patterns * (patterns - 1))

    def _experts(self, tokens: Tensor) -> Tensor:
        """Raw rows of the experts [B, K, d * D]; `expert_norm` makes experts of them."""
        queries = self.pattern_queries.expand(tokens.shape[0], -1, -1)  # [B, K, d]
        queries = queries + self.query_attention(queries, queries)
        queries = queries + self.pattern_attention(self.query_norm(queries), tokens)
        return self.generator(self.generator_norm(queries))

    def _mix(self, experts: Tensor, probabilities: Tensor) -> Tensor:
        mixed = self.expert_norm(experts, probabilities / EXPERT_DIVISOR)  # [B, d * D]
        return mixed.unflatten(1, (self.width, self.teacher_width))

    def _initialise(self, spec: DecoderSpec) -> None:
        xavier(self)
        nn.init.kaiming_uniform_(self.router.weight, a=5**0.5)
        if spec.query_init == "normal":
            nn.init.normal_(self.pattern_queries, std=0.02)


def reduction(student_width: int) -> tuple[nn.Module, int]:
    """What brings student tokens to the decoder's width, and that width (method: 1.3)."""
    if student_width <= WIDEST_UNREDUCED and student_width % HEADS_DIVIDE == 0:
        return nn.Identity(), student_width
    reduce = nn.Sequential(
        nn.Linear(student_width, REDUCED_WIDTH), nn.GELU(), nn.LayerNorm(REDUCED_WIDTH)
    )
    return reduce, REDUCED_WIDTH
