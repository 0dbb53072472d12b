"""The mixture of experts: value and gradients against LayerNorm, GELU and a sum written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpal.model.attention import attend
from dpal.model.mixing import MixingNorm


@pytest.fixture
def norm() -> MixingNorm:
    torch.manual_seed(0)
    norm = MixingNorm(24).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def raw_and_probabilities(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    raw = torch.randn(count, 3, 24, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(count, 3, dtype=torch.float64, requires_grad=True)
    return raw, probabilities  # rows need not sum to 1


def written_out(norm: MixingNorm, raw: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    experts = F.layer_norm(F.gelu(raw), (24,), norm.weight, norm.bias, norm.eps)
    return (probabilities.unsqueeze(2) * experts).sum(dim=1)


def test_value_is_that_of_normalised_experts(norm: MixingNorm) -> None:
    raw, probabilities = raw_and_probabilities()
    expected = written_out(norm, raw, probabilities)
    torch.testing.assert_close(norm(raw, probabilities), expected, atol=1e-12, rtol=0)


def test_gradients_are_those_of_normalised_experts(norm: MixingNorm) -> None:
    raw, probabilities = raw_and_probabilities()
    inputs = (raw, probabilities, norm.weight, norm.bias)
    weights = torch.randn(3, 24, dtype=torch.float64)
    expected = torch.autograd.grad((written_out(norm, raw, probabilities) * weights).sum(), inputs)
    actual = torch.autograd.grad((norm(raw, probabilities) * weights).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_rows_in_bfloat16_are_mixed_in_float32() -> None:
    torch.manual_seed(0)
    norm = MixingNorm(4096)
    raw = torch.randn(2, 3, 4096).bfloat16().requires_grad_()
    probabilities = torch.rand(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm(raw, probabilities)
    assert mixed.dtype == torch.float32
    mixed.square().sum().backward()
    assert raw.grad.dtype == torch.bfloat16
    hidden = F.layer_norm(F.gelu(raw.detach().float()), (4096,))
    expected = (probabilities.unsqueeze(2) * hidden).sum(dim=1)
    assert (mixed - expected).norm() / expected.norm() < 4e-3  # GELU itself is in bfloat16


def test_attention_in_bfloat16_is_as_close_as_its_inputs() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 12).bfloat16().requires_grad_() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        result = attend(q, k, v)
    assert result.dtype == torch.bfloat16
    scores = q.float() @ k.float().transpose(2, 3) / 12**0.5
    expected = scores.softmax(dim=-1) @ v.float()
    assert (result.float() - expected).abs().max() < 2**-7 * expected.abs().max()
