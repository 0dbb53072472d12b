"""The three alignment losses of DPAL and the two terms that steer its decoder.

Every function is pure, works in float32, and returns a scalar. Targets carry no gradient.
Legend: B images, V views, N tokens, D teacher width, K = 3 patterns.
Source: reference `main_align_pretrain_moe.py` and `vision_transformer.py`, final version.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def identity_loss(decoded: Sequence[Tensor], target: Tensor) -> Tensor:
    """Global level: mean over views of the MSE between decoded CLS and the base view's CLS.

    L_g = (1/V) sum_v mean_{B,D} (Y_v - T_g)^2, for V decoded vectors [B, D] and a target [B, D].
    """
    return torch.stack([F.mse_loss(y.float(), target) for y in decoded]).mean()


def shape_loss(decoded: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Local level: MSE of masked patch tokens; the mask [B, N, 1] multiplies both sides.

    L_l = mean_{B,N,D} (m Y - m T)^2, for tokens [B, N, D].
    """
    return (mask * (decoded.float() - target)).square().mean()


def relation_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Instance level: KL divergence between token-affinity rows of teacher and student.

    A = softmax_j(T_i . T_j / sqrt(D)); L_r = mean_{B,i} sum_j A^T_ij (log A^T_ij - log A^S_ij),
    for composite tokens [B, N, D]. Log-softmax throughout: affinity rows are nearly one-hot.
    """
    student, teacher = log_affinity(decoded.float()), log_affinity(target)
    rows = (teacher.exp() * (teacher - student)).sum(dim=-1)  # [B, N]
    return rows.mean()


def log_affinity(tokens: Tensor) -> Tensor:
    """Row-wise log-softmax of scaled token products: [B, N, D] -> [B, N, N]."""
    scores = tokens @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5
    return scores.log_softmax(dim=-1)


def router_loss(logits: Sequence[Tensor], labels: Sequence[int]) -> Tensor:
    """Mean over decoder calls of the cross-entropy of router logits [B, K] and pattern label."""
    terms = [
        F.cross_entropy(z.float(), z.new_full((z.shape[0],), label, dtype=torch.long))
        for z, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(terms).mean()


def expert_penalty(energies: Sequence[Tensor]) -> Tensor:
    """Mean over decoder calls and images of the mixed expert's squared Frobenius norm [B]."""
    return torch.stack([energy.float().mean() for energy in energies]).mean()
