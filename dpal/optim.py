"""Optimiser groups and the learning-rate schedule of the reference.

Source: method 3.3 (AdamW, betas .9/.95, decay .05 on matrices only, linear warm-up, cosine to 0).
"""

import math

import torch
from torch import nn

from dpal.base.recipe import Train


def build_optimizer(module: nn.Module, spec: Train) -> torch.optim.AdamW:
    """AdamW with two groups: parameters with two or more axes decay, the others do not."""
    matrices = [p for p in module.parameters() if p.ndim > 1 and p.requires_grad]
    vectors = [p for p in module.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)


def learning_rate(step: int, total_steps: int, warmup_steps: int, spec: Train) -> float:
    """Rate of optimiser step `step` (0-based).

    Linear from `spec.start_lr` to the peak `spec.lr` over the warm-up, then half a cosine to
    `spec.end_lr`.
    """
    if step < warmup_steps:
        return spec.start_lr + (spec.lr - spec.start_lr) * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    falling = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return spec.end_lr + (spec.lr - spec.end_lr) * falling
