"""Losses against plain NumPy restatements of method section 2, on random input."""

import math

import numpy as np
import pytest
import torch

from dpal import objective

RNG = np.random.default_rng(0)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def test_identity_is_the_mean_over_views_of_the_squared_error() -> None:
    views = [RNG.normal(size=(4, 6)) for _ in range(3)]
    target = RNG.normal(size=(4, 6))
    expected = sum(((y - target) ** 2).mean() for y in views) / 3
    actual = objective.identity_loss([tensor(y) for y in views], tensor(target)).mean()
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_shape_weighs_each_patch_by_its_squared_mask() -> None:
    y, t, m = RNG.normal(size=(2, 5, 6)), RNG.normal(size=(2, 5, 6)), RNG.random((2, 5, 1))
    expected = np.mean(
        [(m[b, n] ** 2) * (y[b, n] - t[b, n]) ** 2 for b in (0, 1) for n in range(5)]
    )
    actual = objective.shape_loss(tensor(y), tensor(t), tensor(m)).mean()
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_relation_is_the_divergence_of_affinity_rows() -> None:
    y, t = RNG.normal(size=(2, 4, 8)), RNG.normal(size=(2, 4, 8))
    total = 0.0
    for b in range(2):
        for i in range(4):
            row_t = np.exp([t[b, i] @ t[b, j] / math.sqrt(8) for j in range(4)])
            row_s = np.exp([y[b, i] @ y[b, j] / math.sqrt(8) for j in range(4)])
            p, q = row_t / row_t.sum(), row_s / row_s.sum()
            total += float((p * np.log(p / q)).sum())
    actual = objective.relation_loss(tensor(y), tensor(t)).mean()
    assert actual.item() == pytest.approx(total / 8, rel=1e-4)


def test_relation_stays_finite_when_the_affinity_is_one_hot() -> None:
    tokens = torch.eye(6).repeat(1, 1, 20)[..., :96] * 40  # products of hundreds
    student = tokens.flip(1).clone().requires_grad_()
    loss = objective.relation_loss(student, tokens).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_router_term_of_an_undecided_router_is_ln_3() -> None:
    logits = [torch.zeros(4, 3), torch.zeros(4, 3)]
    assert objective.router_loss(logits, [0, 2]).mean().item() == pytest.approx(math.log(3))
    decided = torch.tensor([[9.0, 0.0, 0.0]]).repeat(4, 1)
    assert objective.router_loss([decided], [0]).mean().item() < 0.001
    assert objective.router_loss([decided], [1]).mean().item() > 8


def test_expert_penalty_is_the_mean_energy_over_calls_and_images() -> None:
    energies = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])]
    assert objective.expert_penalty(energies).mean().item() == pytest.approx(4.0)
