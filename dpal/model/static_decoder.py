"""What D-PaDe is compared with: decoders whose weights do not depend on the image.

    static   D-PaDe's token encoder, then one MLP per pattern; as many parameters as D-PaDe
    linear   one LayerNorm and linear layer per pattern
    shared   one LayerNorm and linear layer for all patterns

None of them has a router, so the router and expert terms are absent.

Legend: B images, N tokens, d student width, D teacher width, K patterns.
"""

from torch import Tensor, nn

from dpal.base.losses import Decoder as DecoderSpec
from dpal.model.decoder import (
    Attention,
    Decoded,
    DynamicPatternDecoder,
    Pattern,
    reduction,
)
from dpal.model.start_values import xavier


def projection(student_width: int, teacher_width: int) -> nn.Module:
    """LayerNorm and linear layer from student to teacher width: [..., d] -> [..., D]."""
    return nn.Sequential(nn.LayerNorm(student_width), nn.Linear(student_width, teacher_width))


class StaticDecoder(nn.Module):
    """One MLP per pattern, with as many parameters as the dynamic decoder has in all.

    Args:
        student_width: width of the student's tokens.
        teacher_width: width D of the decoded tokens.
        num_parameters: what the hidden width is chosen for.
    """

    def __init__(
        self, student_width: int, teacher_width: int, patterns: int, num_parameters: int
    ) -> None:
        super().__init__()
        self.reduce, width = reduction(student_width)
        self.token_attention = Attention(width, heads=16)
        self.token_norm = nn.LayerNorm(width)
        self.output_norm = nn.LayerNorm(teacher_width)
        missing = num_parameters - sum(p.numel() for p in self.parameters())
        hidden = max(1, round(missing / patterns / (width + teacher_width + 1)))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, teacher_width))
            for _ in range(patterns)
        )
        xavier(self)

    def forward(self, tokens: Tensor, pattern: Pattern) -> Decoded:
        """Decode student tokens [B, N, d] of one pattern: [B, N, D]."""
        tokens = self.reduce(tokens)
        encoded = self.token_norm(tokens + self.token_attention(tokens, tokens))
        return Decoded(self.output_norm(self.mlps[pattern](encoded)), None)


class LinearDecoder(nn.Module):
    """A LayerNorm and a linear layer, for each pattern or for all.

    Args:
        heads: number of patterns with a head of their own; 1 for a shared one.
    """

    def __init__(self, student_width: int, teacher_width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(projection(student_width, teacher_width) for _ in range(heads))
        xavier(self)

    def forward(self, tokens: Tensor, pattern: Pattern) -> Decoded:
        """Decode student tokens [B, N, d] of one pattern: [B, N, D]."""
        head = self.heads[pattern if len(self.heads) > 1 else 0]
        return Decoded(head(tokens), None)


def build_decoder(student_width: int, teacher_width: int, spec: DecoderSpec) -> nn.Module:
    """The decoder that `decoder.kind` names; its forward is (tokens, pattern) -> Decoded."""
    if spec.kind in ("linear", "shared"):
        heads = spec.patterns if spec.kind == "linear" else 1
        return LinearDecoder(student_width, teacher_width, heads)
    dynamic = DynamicPatternDecoder(student_width, teacher_width, spec)
    if spec.kind == "dynamic":
        return dynamic
    size = sum(p.numel() for p in dynamic.parameters())
    return StaticDecoder(student_width, teacher_width, spec.patterns, size)
