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


def bilinear(grid: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value at (x, y) of tokens [G, H, D], token (i, j) at row i and column j; edges go on."""
    rows, columns = grid.shape[:2]
    x, y = min(max(x, 0.0), columns - 1), min(max(y, 0.0), rows - 1)
    left, top = min(int(x), columns - 2), min(int(y), rows - 2)
    a, b = x - left, y - top
    upper = (1 - a) * grid[top, left] + a * grid[top, left + 1]
    lower = (1 - a) * grid[top + 1, left] + a * grid[top + 1, left + 1]
    return (1 - b) * upper + b * lower


def test_an_instance_is_the_mean_of_bilinear_samples_in_its_box() -> None:
    tokens, side, grid, samples = RNG.normal(size=(2, 36, 5)), 96, 6, 8
    boxes = np.sort(RNG.uniform(0, side, (2, 3, 2, 2)), axis=2).reshape(2, 3, 4)
    boxes[0, 0], boxes[0, 1] = (0, 0, side, side), (3, 3, 4, 5)  # all of it; less than a token
    actual = objective.instance_features(tensor(tokens), tensor(boxes), side).numpy()
    for b in range(2):
        for m, (left, top, right, bottom) in enumerate(boxes[b]):
            points = [
                bilinear(
                    tokens[b].reshape(grid, grid, 5),
                    (left + (k + 0.5) / samples * (right - left)) * grid / side - 0.5,
                    (top + (j + 0.5) / samples * (bottom - top)) * grid / side - 0.5,
                )
                for k in range(samples)
                for j in range(samples)
            ]
            np.testing.assert_allclose(actual[b, m], np.mean(points, axis=0), atol=1e-5)


def test_the_tokens_of_a_region_are_the_means_of_bilinear_samples_in_its_bins() -> None:
    tokens, (rows, columns), (height, width) = RNG.normal(size=(2, 32, 5)), (8, 4), (4, 3)
    regions = RNG.uniform(0, 1, (2, 3, 4))
    regions[0, 0], regions[0, 1] = (0, 0, 1, 1), (0.9, 0.2, 0.4, 0.7)  # all; mirrored
    found = objective.region_features(tensor(tokens), tensor(regions), (8, 4), (4, 3)).numpy()
    assert found.shape == (2, 3, 12, 5)
    for b in range(2):
        for c, (left, top, right, bottom) in enumerate(regions[b]):
            for i in range(height):
                for j in range(width):
                    points = [
                        bilinear(
                            tokens[b].reshape(rows, columns, 5),
                            (left + (j + k) / width * (right - left)) * columns - 0.5,
                            (top + (i + m) / height * (bottom - top)) * rows - 0.5,
                        )
                        for k in (0.25, 0.75)
                        for m in (0.25, 0.75)
                    ]
                    expected = np.mean(points, axis=0)
                    np.testing.assert_allclose(found[b, c, i * width + j], expected, atol=1e-5)


def test_a_whole_view_as_its_own_region_is_itself_and_mirrored_its_mirror_image() -> None:
    tokens = tensor(RNG.normal(size=(1, 32, 5)))
    regions = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]])
    plain, mirrored = objective.region_features(tokens, regions, (8, 4), (8, 4), samples=1)[0]
    assert torch.allclose(plain, tokens[0], atol=1e-6)
    assert torch.allclose(mirrored, tokens.unflatten(1, (8, 4)).flip(2).flatten(1, 2)[0], atol=1e-6)


def test_a_box_over_one_token_is_that_token_when_its_neighbours_are_alike() -> None:
    tokens = torch.zeros(1, 16, 2)
    tokens[0, 8:, 0] = 1.0  # lower half
    tokens[0, :, 1] = torch.arange(16) % 4  # the column
    boxes = torch.tensor([[[0.0, 0, 64, 16], [0, 48, 64, 64], [16, 0, 32, 64]]])
    upper, lower, second = objective.instance_features(tokens, boxes, 64)[0]
    assert (upper[0], lower[0]) == (0, 1)
    assert second.tolist() == pytest.approx([0.5, 1.0])


def instance_relation(student: np.ndarray, teacher: np.ndarray) -> float:
    """The relation of the instances [M, D] of one scene."""
    if len(student) < 2:
        return 0.0
    logs = []
    for features in (student, teacher):
        scores = features @ features.T / math.sqrt(features.shape[1])
        logs.append(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1).mean())


def test_instances_are_related_within_their_scene_and_padding_changes_nothing() -> None:
    counts = [4, 2, 1, 0, 3]
    student, teacher = RNG.normal(size=(5, 4, 6)), RNG.normal(size=(5, 4, 6))
    expected = [instance_relation(student[b, :n], teacher[b, :n]) for b, n in enumerate(counts)]
    assert expected[2:4] == [0.0, 0.0]
    losses = []
    for padding in (0.0, 1.0, 1e4, -1e4):
        filled = [np.full((5, 9, 6), padding), np.full((5, 9, 6), -padding)]
        for rows, features in zip(filled, (student, teacher), strict=True):
            for b, n in enumerate(counts):
                rows[b, :n] = features[b, :n]
        y = tensor(filled[0]).requires_grad_()
        loss = objective.instance_relation_loss(y, tensor(filled[1]), torch.tensor(counts))
        loss.sum().backward()
        losses.append(loss.detach())
        np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
        gradient = y.grad.numpy()
        assert np.isfinite(gradient).all()
        for b, n in enumerate(counts):
            assert not gradient[b, n:].any()
            assert gradient[b, :n].any() == (n > 1)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


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
