"""From raw expert rows to one mixed expert per image, without writing the experts down.

Each image has K experts of L = d * D numbers. GELU, LayerNorm over all L and the router's mixture
are one step with a backward of its own: the normalised experts [B, K, L], the largest tensors of
pretraining, are never stored.

Legend: B images, K experts, L numbers of an expert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MixingNorm(nn.LayerNorm):
    """sum_k p_k LayerNorm(GELU(raw_k)): a LayerNorm by its parameters, a mixture by its result."""

    def forward(self, raw: Tensor, probabilities: Tensor) -> Tensor:
        """Mix raw rows [B, K, L] by probabilities [B, K]: [B, L], in float32 or wider."""
        return _Mixture.apply(raw, probabilities, self.weight, self.bias, self.eps)


class _Mixture(torch.autograd.Function):
    """With h = GELU(raw), x_k = (h_k - m_k) r_k and rows sharing weight w and bias b:

        mixed = w * sum_k p_k x_k + b * sum_k p_k

    and, for a gradient g of mixed and u = g * w,

        dh_k = p_k r_k (u - mean(u) - x_k mean(u x_k)),   dp_k = sum(u x_k) + sum(g b).
    """

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, probabilities: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        wide = torch.promote_types(raw.dtype, torch.float32)
        share = probabilities.to(wide)
        means, scales = (torch.empty_like(share) for _ in range(2))
        mixed = raw.new_empty(raw.shape[0], raw.shape[2], dtype=wide)
        with torch.autocast(raw.device.type, enabled=False):
            for rows in _portions(raw):
                h = F.gelu(raw[rows]).to(wide)
                mean = h.mean(dim=2)  # [b, K]
                spread = torch.linalg.vector_norm(h - mean.unsqueeze(2), dim=2)
                scales[rows], means[rows] = (spread.square() / h.shape[2] + eps).rsqrt(), mean
                plain = _plain(h, share[rows] * scales[rows], mean)
                torch.mul(plain, weight, out=mixed[rows])
                mixed[rows] += share[rows].sum(dim=1, keepdim=True) * bias
        ctx.save_for_backward(raw, share, means, scales, weight, bias)
        ctx.dtype = probabilities.dtype
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raw, share, means, scales, weight, bias = ctx.saved_tensors
        grad, length = grads[0], raw.shape[2]
        grad_raw, grad_share = torch.empty_like(raw), torch.empty_like(share)
        grad_weight = torch.zeros_like(weight)
        with torch.autocast(raw.device.type, enabled=False):
            for rows in _portions(raw):
                g, mean, scale = grad[rows], means[rows], scales[rows]
                h = F.gelu(raw[rows]).to(g.dtype)  # again: cheaper than to keep it
                factor = share[rows] * scale
                grad_weight += (g * _plain(h, factor, mean)).sum(dim=0)
                u = g * weight  # [b, L]
                total = u.sum(dim=1, keepdim=True)  # [b, 1]
                along = scale * (torch.bmm(h, u.unsqueeze(2)).squeeze(2) - mean * total)  # [b, K]
                grad_share[rows] = along + (g @ bias).unsqueeze(1)
                slope = factor * scale * along / length
                shift = slope * mean - factor * total / length
                grad_h = factor.unsqueeze(2) * u.unsqueeze(1)
                grad_h += shift.unsqueeze(2)
                grad_h -= h.mul_(slope.unsqueeze(2))
                grad_raw[rows] = torch.ops.aten.gelu_backward(grad_h.to(raw.dtype), raw[rows])
            grad_bias = share.sum(dim=1) @ grad
        return grad_raw, grad_share.to(ctx.dtype), grad_weight, grad_bias, None


def _plain(h: Tensor, factor: Tensor, mean: Tensor) -> Tensor:
    """sum_k factor_k (h_k - mean_k): [b, L] of h [b, K, L] and two [b, K]."""
    return torch.bmm(factor.unsqueeze(1), h).squeeze(1) - (factor * mean).sum(dim=1, keepdim=True)


def _portions(raw: Tensor) -> list[slice]:
    """Images worked on at once: one on a CPU, so that its rows stay in the cache, else all."""
    size = 1 if raw.device.type == "cpu" else max(1, raw.shape[0])
    return [slice(start, start + size) for start in range(0, raw.shape[0], size)]
