"""The decoders that D-PaDe is compared with, and D-PaDe's top-1 routing."""

import numpy as np
import pytest
import torch

from dpal.base.losses import Decoder
from dpal.model.decoder import DynamicPatternDecoder, Pattern
from dpal.model.static_decoder import LinearDecoder, StaticDecoder, build_decoder


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("patterns", [2, 3])
@pytest.mark.parametrize(("student", "teacher"), [(192, 768), (384, 768), (768, 1024), (96, 256)])
def test_the_static_decoder_is_as_large_as_the_dynamic_one(
    student: int, teacher: int, patterns: int
) -> None:
    with torch.device("meta"):
        dynamic = build_decoder(student, teacher, Decoder(patterns=patterns))
        static = build_decoder(student, teacher, Decoder(kind="static", patterns=patterns))
    assert isinstance(static, StaticDecoder)
    assert size(static) == pytest.approx(size(dynamic), rel=0.005)


@pytest.mark.parametrize(("kind", "heads"), [("linear", 3), ("shared", 1)])
def test_a_linear_decoder_has_a_layer_for_each_pattern_or_for_all(kind: str, heads: int) -> None:
    decoder = build_decoder(48, 10, Decoder(kind=kind))
    assert isinstance(decoder, LinearDecoder)
    assert size(decoder) == heads * (2 * 48 + 48 * 10 + 10)
    x = torch.randn(2, 5, 48)
    first, second = (decoder(x, pattern) for pattern in (Pattern.IDENTITY, Pattern.SHAPE))
    assert first.routing is None
    assert torch.equal(first.tokens, second.tokens) == (heads == 1)


@pytest.mark.parametrize("kind", ["static", "linear"])
def test_what_one_pattern_learns_leaves_the_others_heads_alone(kind: str) -> None:
    decoder = build_decoder(48, 10, Decoder(kind=kind))
    decoder(torch.randn(2, 5, 48), Pattern.SHAPE).tokens.square().sum().backward()
    heads = decoder.mlps if kind == "static" else decoder.heads
    touched = [any(p.grad is not None for p in head.parameters()) for head in heads]
    assert touched == [False, True, False]


def test_top_1_takes_one_expert_and_still_teaches_the_router() -> None:
    torch.manual_seed(0)
    spec = Decoder(routing="top-1", query_init="normal")
    decoder, soft = DynamicPatternDecoder(48, 10, spec), DynamicPatternDecoder(48, 10, Decoder())
    soft.load_state_dict(decoder.state_dict())
    for module in (decoder, soft):
        module.router.weight.data.mul_(20)  # images differ in their choice
    x = torch.randn(8, 5, 48)
    logits = decoder._route(decoder.token_norm(x + decoder.token_attention(x, x)))
    shares = decoder._shares(logits)
    probabilities = torch.softmax(logits.detach().double(), dim=1).numpy()
    expected = np.where(probabilities == probabilities.max(axis=1, keepdims=True), probabilities, 0)
    np.testing.assert_allclose(shares.detach().numpy(), expected, atol=1e-6)
    assert (shares > 0).sum(dim=1).tolist() == [1] * 8
    assert not torch.allclose(decoder(x, Pattern.SHAPE).tokens, soft(x, Pattern.SHAPE).tokens)
    decoder(x, Pattern.SHAPE).tokens.square().mul(torch.arange(10)).sum().backward()
    assert decoder.router.weight.grad.abs().max() > 0
    assert decoder.router_query.grad.abs().max() > 0
