"""D-PaDe: published sizes, start values, and an independent restatement of its forward."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dpal.base.losses import Decoder
from dpal.model.decoder import Attention, DynamicPatternDecoder, Pattern


@pytest.mark.parametrize(
    ("student", "teacher", "millions"),
    [(192, 768, 29.35), (192, 1024, 38.9), (384, 768, 116.5), (768, 1024, 39.1)],
)
def test_size_is_the_published_one(student: int, teacher: int, millions: float) -> None:
    with torch.device("meta"):
        decoder = DynamicPatternDecoder(student, teacher, Decoder())
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_starts_with_small_penalty_and_undecided_router() -> None:
    torch.manual_seed(0)
    decoder = DynamicPatternDecoder(192, 768, Decoder())
    tokens = nn.functional.layer_norm(torch.randn(16, 128, 192), (192,))
    decoded = decoder(tokens, Pattern.SHAPE)
    assert decoded.tokens.shape == (16, 128, 768)
    assert 0.025 * decoded.routing.energy.mean().item() == pytest.approx(0.056, abs=0.002)
    labels = torch.full((16,), int(Pattern.SHAPE))
    crossentropy = nn.functional.cross_entropy(decoded.routing.logits, labels).item()
    assert crossentropy == pytest.approx(math.log(3), abs=0.15)


def test_zero_queries_give_three_identical_experts_at_start() -> None:
    torch.manual_seed(0)
    decoder = DynamicPatternDecoder(32 * 6, 24, Decoder())
    experts = decoder._experts(torch.randn(2, 5, 192))
    assert torch.equal(experts[:, 0], experts[:, 1])
    assert torch.equal(experts[:, 0], experts[:, 2])
    other = DynamicPatternDecoder(192, 24, Decoder(query_init="normal"))
    experts = other._experts(torch.randn(2, 5, 192))
    assert not torch.equal(experts[:, 0], experts[:, 1])


def test_experts_separate_under_the_router_loss() -> None:
    """The zero start is symmetric; pattern-specific routing must break it."""
    torch.manual_seed(0)
    decoder = DynamicPatternDecoder(48, 8, Decoder())
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    x = {pattern: torch.randn(8, 3, 48) + 2 * pattern for pattern in Pattern}
    y = {pattern: torch.randn(8, 3, 8) for pattern in Pattern}
    for _ in range(40):
        loss = torch.zeros(())
        for pattern in Pattern:
            out = decoder(x[pattern], pattern)
            label = torch.full((8,), int(pattern))
            loss = loss + (out.tokens - y[pattern]).square().mean()
            loss = loss + nn.functional.cross_entropy(out.routing.logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    experts = decoder._experts(x[Pattern.SHAPE])
    assert (experts[:, 0] - experts[:, 1]).abs().mean() > 1e-3


def test_forward_agrees_with_a_restatement_in_float64() -> None:
    torch.manual_seed(1)
    decoder = DynamicPatternDecoder(48, 10, Decoder(query_init="normal")).double()
    for parameter in decoder.parameters():  # leave the start values, so that nothing cancels
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 7, 48, dtype=torch.float64)
    actual = decoder(tokens, Pattern.SHAPE)
    for image in range(3):
        decoded, logits, energy = _restated(decoder, tokens[image].numpy())
        np.testing.assert_allclose(actual.tokens[image].detach().numpy(), decoded, atol=1e-9)
        np.testing.assert_allclose(actual.routing.logits[image].detach().numpy(), logits, atol=1e-9)
        assert actual.routing.energy[image].item() == pytest.approx(energy, rel=1e-5)


def _restated(
    decoder: DynamicPatternDecoder, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Method section 1.3 for one image x [N, d], written with loops over heads."""
    d = x.shape[1]
    encoded = _norm(decoder.token_norm, x + _attend(decoder.token_attention, x, x))
    query = _norm(decoder.router_norm, decoder.router_query[0].detach().numpy())
    u = _attend(decoder.router_attention, query, encoded)[0]
    z = decoder.router.weight.detach().numpy() @ u
    s = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    q0 = decoder.pattern_queries[0].detach().numpy()
    q1 = q0 + _attend(decoder.query_attention, q0, q0)
    q2 = q1 + _attend(decoder.pattern_attention, _norm(decoder.query_norm, q1), x)
    mixed = np.zeros((d, decoder.teacher_width))
    for k in range(3):
        row = _linear(decoder.generator, _norm(decoder.generator_norm, q2[k]))
        expert = _norm(decoder.expert_norm, _gelu(row)).reshape(d, -1)
        mixed += s[k] * expert / 256
    decoded = _norm(decoder.output_norm, _gelu(encoded @ mixed))
    return decoded, z, float((mixed**2).sum())


def _attend(module: Attention, queries: np.ndarray, context: np.ndarray) -> np.ndarray:
    d = queries.shape[1]
    width = d // module.heads
    q = _linear(module.q, queries)
    kv = _linear(module.kv, context)
    out = np.zeros_like(q)
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        k, v = kv[:, :d][:, part], kv[:, d:][:, part]
        scores = q[:, part] @ k.T / math.sqrt(width)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v
    return _linear(module.proj, out)


def _linear(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ module.weight.detach().numpy().T + module.bias.detach().numpy()


def _norm(module: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + module.eps)
    return scaled * module.weight.detach().numpy() + module.bias.detach().numpy()


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
