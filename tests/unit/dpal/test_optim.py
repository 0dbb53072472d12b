"""Learning rates and optimiser groups."""

import math

import pytest
import torch

from dpal.base.recipe import Train
from dpal.optim import build_optimizer, learning_rate

SPEC = Train(lr=4e-3, start_lr=1e-3, end_lr=5e-4)


def rate(step: int) -> float:
    return learning_rate(step, 110, 10, SPEC)


def test_the_warm_up_is_a_line_from_the_start_rate_to_the_peak() -> None:
    for step in range(10):
        assert rate(step) == pytest.approx(1e-3 + 3e-3 * (step + 1) / 10)
    assert rate(9) == pytest.approx(4e-3)


def test_the_decay_is_half_a_cosine_to_the_end_rate() -> None:
    for step in range(10, 110):
        share = (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert rate(step) == pytest.approx(5e-4 + 3.5e-3 * share)
    assert rate(60) == pytest.approx((4e-3 + 5e-4) / 2)
    assert rate(110) == rate(500) == pytest.approx(5e-4)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_by_default_it_starts_and_ends_at_zero() -> None:
    plain = Train(lr=1e-3)
    assert learning_rate(0, 100, 10, plain) == pytest.approx(1e-4)
    assert learning_rate(100, 100, 10, plain) == pytest.approx(0.0)
    assert learning_rate(0, 100, 0, plain) == pytest.approx(1e-3)


def test_matrices_decay_vectors_do_not_and_frozen_ones_are_left_out() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)
    )
    module[2].requires_grad_(False)
    matrices, vectors = build_optimizer(module, Train(weight_decay=0.2)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert [p.shape for p in vectors["params"]] == [(2,), (2,), (2,)]
