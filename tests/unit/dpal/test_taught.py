"""The taught ViT: its losses say what they should."""

import math

import pytest
import torch
from torch.nn import functional as F

from dpal.base.teachers import TaughtTeacher
from dpal.model.taught import (
    METRIC_TEMPERATURE,
    Labels,
    Taught,
    Trait,
    _per_patch,
    arch_of,
    build_taught,
    metric_loss,
)

SPEC = TaughtTeacher(kind="taught", width=48, depth=2, heads=3)
TRAITS = (Trait(3, (1,)), Trait(2, (2, 3)))


def _model() -> Taught:
    torch.manual_seed(0)
    return Taught(arch_of(SPEC, (128, 64)), num_identities=4, num_parts=4, traits=TRAITS)


def _labels() -> Labels:
    parts = torch.zeros(8, 32, 16, dtype=torch.long)
    parts[:, 8:16], parts[:, 16:24], parts[:, 24:] = 1, 2, 3
    identities = torch.arange(8) % 4
    return Labels(identities, torch.stack([identities % 3, identities % 2], 1), parts)


def test_metric_loss_agrees_with_the_equation() -> None:
    torch.manual_seed(1)
    cls = F.normalize(torch.randn(6, 5), dim=1)
    identities = torch.tensor([0, 0, 0, 1, 1, 2])  # the last one has no partner
    terms = []
    for i in range(5):
        partners = [p for p in range(6) if p != i and identities[p] == identities[i]]
        weights = [math.exp(float(cls[i] @ cls[a]) / METRIC_TEMPERATURE) for a in range(6)]
        below = sum(weights) - weights[i]
        terms.append(-sum(math.log(weights[p] / below) for p in partners) / len(partners))
    expected = sum(terms) / len(terms)
    assert float(metric_loss(cls, identities)) == pytest.approx(expected, rel=1e-5)


def test_metric_loss_without_any_pair_is_zero_with_a_gradient() -> None:
    cls = F.normalize(torch.randn(3, 5), dim=1).requires_grad_()
    loss = metric_loss(cls, torch.arange(3))
    loss.backward()
    assert float(loss) == 0
    assert torch.isfinite(cls.grad).all()


def test_labels_are_grouped_by_the_patch_they_lie_in() -> None:
    rows, columns = torch.arange(32)[:, None], torch.arange(16)[None, :]
    patch_of = (rows // 4) * 4 + columns // 4  # [32, 16] of a grid of 8 x 4 patches
    grouped = _per_patch(patch_of[None])
    assert grouped.shape == (1, 32, 16)
    assert torch.equal(grouped[0], torch.arange(32)[:, None].expand(32, 16))


def test_local_attributes_are_judged_where_they_can_be_seen() -> None:
    model, labels = _model(), _labels()
    planes = torch.randn(8, 3, 128, 64)
    with torch.no_grad():
        before = float(model(planes, labels).local)
        hidden = labels._replace(parts=torch.zeros_like(labels.parts))
        assert float(model(planes, hidden).local) == 0
    assert before > 0.3


def test_every_weight_of_the_vit_is_taught() -> None:
    model = _model()
    model(torch.randn(8, 3, 128, 64), _labels()).total.backward()
    untouched = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]
    assert untouched == []


def test_teaching_learns_what_it_is_shown() -> None:
    model, labels = _model(), _labels()
    planes = torch.randn(8, 3, 128, 64) * 0.1 + labels.identities.view(-1, 1, 1, 1) / 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(planes, labels)
    for _ in range(60):
        optimizer.zero_grad()
        losses = model(planes, labels)
        losses.total.backward()
        optimizer.step()
    for name in ("identity", "metric", "parts", "local"):
        assert float(getattr(losses, name)) < 0.8 * float(getattr(first, name)), name


def test_the_vit_takes_square_composites_too() -> None:
    vit = build_taught(arch_of(SPEC, (128, 64))).eval()
    with torch.inference_mode():
        tokens = vit.forward_features(torch.randn(2, 3, 128, 128))
    assert tokens.shape == (2, 1 + 64, 48)
