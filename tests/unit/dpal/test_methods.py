"""Every method's whole loss against a restatement in NumPy float64, given the student's tokens.

Legend: B samples, N patches, D teacher width, H heads, d width of a head.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpal.base.errors import ConfigError
from dpal.base.teachers import IMAGENET_MEAN, IMAGENET_STD
from dpal.method.proteus import ProteusTask
from dpal.model.decoder import Pattern
from dpal.objective import region_features
from dpal.task import Task

from made_task import (
    GRID,
    TEACHER,
    WIDTH,
    Frozen,
    MadeTargets,
    made_batch,
    made_recipe,
    moment,
    task_of,
)

BLOCK = {**TEACHER, "tap": "block9"}
NUM_PATCHES = GRID[0] * GRID[1]


def built(method: Any, **sections: Any) -> Task:
    """A task whose parameters have all left their start values."""
    recipe = made_recipe(method, **{"teacher": BLOCK, **sections})
    task = task_of(recipe)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        for parameter in task.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return task


def pixels_of(views: np.ndarray) -> torch.Tensor:
    """Normalised pixels, written out."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    return torch.from_numpy((views / 255.0 - mean) / std).permute(0, 3, 1, 2).float()


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def head(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """LayerNorm and linear layer."""
    norm, linear = module
    centred = x - x.mean(axis=-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    x = x * array(norm.weight) + array(norm.bias)
    return x @ array(linear.weight).T + array(linear.bias)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def targets_of(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    base = MadeTargets()(batch, torch.device("cpu")).base
    return array(base.cls), array(base.patches)


def terms(task: Task, batch: Any, step: int = 0) -> dict[str, float]:
    losses = task(batch, moment(step))
    assert losses.terms[0] == losses.total
    return dict(zip(task.terms, losses.terms.tolist(), strict=True))


@pytest.mark.parametrize("space", ["raw", "standardised"])
def test_mse_is_the_weighted_error_of_projected_tokens(space: str) -> None:
    weights = {"kind": "mse", "identity": 0.5, "shape": 2.0}
    task, batch = built(weights, loss={"targets": space}), made_batch()
    seen = task.student(pixels_of(batch.base))
    cls, patches = targets_of(batch)
    if space == "standardised":
        header = MadeTargets().header
        cls = (cls - header.cls_mean) / header.cls_std
        patches = (patches - header.patch_mean) / header.patch_std
    heads = task.decoder[0]
    identity = ((head(heads["identity"], array(seen.cls)) - cls) ** 2).mean()
    shape = ((head(heads["shape"], array(seen.patches)) - patches) ** 2).mean()
    actual = terms(task, batch)
    assert actual["identity"] == pytest.approx(identity, rel=1e-4)
    assert actual["shape"] == pytest.approx(shape, rel=1e-4)
    assert actual["loss"] == pytest.approx(0.5 * identity + 2 * shape, rel=1e-4)


def test_proteus_is_token_feature_and_masked_patch_error() -> None:
    """Where half of the images are masked, the patch term is the reference's plain mean."""
    weights = {"kind": "proteus", "token": 0.7, "feature": 1.3, "patch": 0.4}
    task, batch = built(weights), made_batch()
    step = next(s for s in range(99) if masks(task, batch, s).any(axis=1).sum() == 2)
    mask = masks(task, batch, step)
    cls, patches = targets_of(batch)
    with torch.no_grad():
        seen = task.student(pixels_of(batch.base))
        hidden = task.student(pixels_of(batch.base), torch.from_numpy(mask))
    heads = task.decoder[0]
    c = head(heads["token"], array(seen.cls))
    p = head(heads["feature"], array(seen.patches))
    token = np.mean((c - cls) ** 2)
    rows = [(c[b] - cls[b]) ** 2 for b in range(4)]
    rows += [(p[b, i] - patches[b, i]) ** 2 for b in range(4) for i in range(NUM_PATCHES)]
    feature = np.mean(rows)
    m = head(heads["patch"], array(hidden.patches))
    patch = np.mean([(m[b, i] - patches[b, i]) ** 2 for b, i in np.argwhere(mask)])
    actual = terms(task, batch, step)
    assert actual["token"] == pytest.approx(token, rel=1e-4)
    assert actual["feature"] == pytest.approx(feature, rel=1e-4)
    assert actual["patch"] == pytest.approx(patch, rel=1e-4)
    total = 0.7 * token + 1.3 * feature + 0.4 * patch
    assert actual["loss"] == pytest.approx(total, rel=1e-4)


def masks(task: ProteusTask, batch: Any, step: int) -> np.ndarray:
    return np.stack([task._mask(key, step, NUM_PATCHES) for key in batch.keys])


def test_a_mask_belongs_to_seed_sample_and_step_and_covers_half() -> None:
    task, other = built("proteus"), built("proteus", seed=1)
    drawn = {(key, s): task._mask(key, s, NUM_PATCHES) for key in "abcdefgh" for s in range(50)}
    assert all(np.array_equal(task._mask(*k, NUM_PATCHES), v) for k, v in drawn.items())
    different = [not np.array_equal(other._mask(*k, NUM_PATCHES), v) for k, v in drawn.items()]
    assert np.mean(different) > 0.6  # both unmasked in a quarter of the draws
    masked = [v for v in drawn.values() if v.any()]
    assert abs(len(masked) / 400 - 0.5) < 0.1  # four standard deviations
    assert {int(v.sum()) for v in masked} == {NUM_PATCHES // 2}
    assert len({v.tobytes() for v in masked}) == len(masked)
    hits = np.mean(masked, axis=0)
    assert 0.3 < hits.min() < 0.5 < hits.max() < 0.7  # no patch is preferred


def test_a_batch_without_any_masked_image_has_no_patch_term() -> None:
    task, batch = built({"kind": "proteus", "mask_probability": 0.01}), made_batch()
    step = next(s for s in range(99) if not masks(task, batch, s).any())
    losses = task(batch, moment(step))
    losses.total.backward()
    assert losses.terms[task.terms.index("patch")] == 0
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_the_losses_of_a_batch_are_the_mean_over_its_halves() -> None:
    """Nothing depends on which samples share a batch: cut or accumulated, it is one loss."""
    for method in ("mse", "proteus", "tinymim", "dpal"):
        sections = {"student": {"drop_path": 0.3}}
        task = built(method, **sections)
        task.train()
        whole = terms(task, made_batch(0, 4), 3)
        halves = [terms(task, made_batch(first, 2), 3) for first in (0, 2)]
        for name, value in whole.items():
            mean = (halves[0][name] + halves[1][name]) / 2
            assert value == pytest.approx(mean, rel=1e-4), (method, name)


@pytest.mark.parametrize("method", ["dpal", "mse"])
def test_a_sample_that_is_twice_in_a_batch_drops_the_same_paths_twice(method: str) -> None:
    """Where two epochs meet; else its draws would depend on the batch it is in."""
    task, once = built(method, student={"drop_path": 0.3}), made_batch(size=2)
    row = {"keys": once.keys[:1]} | {
        name: getattr(once, name)[:1] for name in ("base", "crops", "composite", "photometric")
    }
    parts = {
        name: (*value, *getattr(once, name))
        if name == "keys"
        else np.concatenate([value, getattr(once, name)])
        for name, value in row.items()
    }
    single, pair, three = (
        terms(task, batch, 3) for batch in (replace(once, **row), once, replace(once, **parts))
    )
    for name, value in three.items():
        mean = (single[name] + 2 * pair[name]) / 3
        assert value == pytest.approx(mean, rel=1e-4), name


def test_tinymim_is_the_divergence_of_the_last_blocks_relations() -> None:
    task = built({"kind": "tinymim", "qk": 0.6, "vv": 1.7}, loss={"targets": "standardised"})
    batch = made_batch(size=2)
    with torch.no_grad():
        inner = task.student.blocks[:-1](task.student.embed(pixels_of(batch.base)))
    last = task.student.blocks[-1]
    mine = head([last.norm1, last.attn.qkv], array(inner))  # [B, 1 + N, 3 * 192]
    cls, patches = targets_of(batch)  # raw: the projection reads the block's own input
    theirs = np.concatenate([cls[:, None], patches], axis=1) @ Frozen().weight
    qk, vv = [], []
    for b in range(2):
        for h in range(12):
            parts = []
            for joined, d in ((mine[b], 16), (theirs[b], 4)):
                q, k, v = (joined[:, i * 12 * d + h * d :][:, :d] for i in range(3))
                relations = softmax(q @ k.T / math.sqrt(d)), softmax(v @ v.T / math.sqrt(d))
                parts.append(relations)
            (s_qk, s_vv), (t_qk, t_vv) = parts
            qk.append((t_qk * np.log(t_qk / s_qk)).sum(axis=1).mean())
            vv.append((t_vv * np.log(t_vv / s_vv)).sum(axis=1).mean())
    actual = terms(task, batch)
    assert actual["qk"] == pytest.approx(np.mean(qk), rel=1e-3)
    assert actual["vv"] == pytest.approx(np.mean(vv), rel=1e-3)
    assert actual["loss"] == pytest.approx(0.6 * np.mean(qk) + 1.7 * np.mean(vv), rel=1e-3)


def test_tinymim_relates_patches_alone_to_a_teacher_without_cls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its global vector, the mean of the patches, is no token that its attention ever saw."""
    batch = made_batch(size=2)
    with_cls = terms(built("tinymim"), batch)
    monkeypatch.setattr(Frozen, "has_cls", False)
    task = built("tinymim")
    with torch.no_grad():
        inner = task.student.blocks[:-1](task.student.embed(pixels_of(batch.base)))
    last = task.student.blocks[-1]
    mine = head([last.norm1, last.attn.qkv], array(inner))[:, 1:]  # [B, N, 3 * 192]
    theirs = targets_of(batch)[1] @ Frozen().weight
    qk = []
    for b in range(2):
        for h in range(12):
            s, t = (
                softmax(q @ k.T / math.sqrt(d))
                for d, q, k in (
                    (d, x[:, h * d :][:, :d], x[:, 12 * d + h * d :][:, :d])
                    for x, d in ((mine[b], 16), (theirs[b], 4))
                )
            )
            qk.append((t * np.log(t / s)).sum(axis=1).mean())
    actual = terms(task, batch)
    assert actual["qk"] == pytest.approx(np.mean(qk), rel=1e-3)
    assert actual["vv"] != pytest.approx(with_cls["vv"], rel=1e-6)


def test_tinymim_trains_exactly_what_relations_reach() -> None:
    task = built("tinymim")
    task(made_batch(), moment()).total.backward()
    for name, parameter in task.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name
    frozen = [name for name, p in task.student.named_parameters() if not p.requires_grad]
    assert all(name.startswith(("blocks.11.", "norm.")) for name in frozen)


def test_tinymim_refuses_another_number_of_heads_and_other_networks() -> None:
    with pytest.raises(ConfigError, match=r"student\.last_heads=16"):
        built("tinymim", student={"last_heads": 16})
    with pytest.raises(ConfigError, match=r"student\.name=swin_tiny"):
        built("tinymim", student={"name": "swin_tiny"})


@pytest.mark.parametrize("step", [9, 10])
def test_dpal_is_the_weighted_sum_of_its_five_terms(step: int) -> None:
    loss = {"identity": 0.9, "shape": 1.4, "relation": 0.3, "expert": 0.05}
    loss |= {"router": 0.2, "router_late": 0.07, "router_switch": "10 steps"}
    task, batch = built("dpal", loss=loss, decoder={"query_init": "normal"}), made_batch(size=2)
    decoder = task.decoder[0]
    with torch.no_grad():
        base = task.student(pixels_of(batch.base))
        pair = task.student(pixels_of(batch.composite))
        crops = [task.student(pixels_of(batch.crops[:, i])).cls for i in range(2)]
        calls = [(decoder(v[:, None], Pattern.IDENTITY), 0) for v in (base.cls, *crops)]
        calls.append((decoder(base.patches, Pattern.SHAPE), 1))
        tokens = torch.cat([pair.cls[:, None], pair.patches], dim=1)
        calls.append((decoder(tokens, Pattern.RELATION), 2))
    targets = MadeTargets()(batch, torch.device("cpu"))
    cls, patches = array(targets.base.cls), array(targets.base.patches)
    identity = np.mean([((array(c.tokens)[:, 0] - cls) ** 2).mean() for c, _ in calls[:3]])
    header = MadeTargets().header
    mask = np.clip((patches @ header.direction.astype(float) + 1.5) / 3, 0, 1)[..., None]
    shape = ((mask * (array(calls[3][0].tokens) - patches)) ** 2).mean()
    theirs = np.concatenate([array(targets.composite.cls)[:, None],
                             array(targets.composite.patches)], axis=1)  # fmt: skip
    rows = []
    for s, t in zip(array(calls[4][0].tokens), theirs, strict=True):
        q, p = softmax(s @ s.T / math.sqrt(WIDTH)), softmax(t @ t.T / math.sqrt(WIDTH))
        rows.append((p * np.log(p / q)).sum(axis=1).mean())
    logits = [(array(call.routing.logits), label) for call, label in calls]
    router = np.mean([-np.log(softmax(z)[:, label]).mean() for z, label in logits])
    expert = np.mean([array(call.routing.energy).mean() for call, _ in calls])
    expected = {"identity": identity, "shape": shape, "relation": np.mean(rows)}
    expected |= {"router": router, "expert": expert}
    actual = terms(task, batch, step)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-3), name
    weight = {**loss, "router": 0.2 if step < 10 else 0.07}
    total = sum(weight[name] * value for name, value in expected.items())
    assert actual["loss"] == pytest.approx(total, rel=1e-3)


def test_dpal_compares_the_patches_of_crops_with_what_lies_there_in_the_base_view() -> None:
    loss = {"identity": 0, "relation": 0, "crop_patches": True}
    task, batch = built("dpal", loss=loss), made_batch(size=2)
    assert task.needs.crops
    assert not task.needs.composite
    decoder, header = task.decoder[0], MadeTargets().header
    with torch.no_grad():
        views = [batch.base, *(batch.crops[:, i] for i in range(2))]
        calls = [decoder(task.student(pixels_of(v)).patches, Pattern.SHAPE) for v in views]
    _, patches = targets_of(batch)
    mask = np.clip((patches @ header.direction.astype(float) + 1.5) / 3, 0, 1)[..., None]
    pairs = [(patches, mask)]
    for i in range(2):
        regions = torch.from_numpy(batch.regions[:, i : i + 1])
        pairs.append(
            tuple(
                array(region_features(torch.from_numpy(x), regions, GRID, (4, 3))[:, 0])
                for x in (patches, mask)
            )
        )
    errors = [
        ((m * (array(call.tokens) - t)) ** 2).mean()
        for call, (t, m) in zip(calls, pairs, strict=True)
    ]
    actual = terms(task, batch)
    assert actual["shape"] == pytest.approx(np.mean(errors), rel=1e-3)
    router = np.mean([-np.log(softmax(array(c.routing.logits))[:, 1]).mean() for c in calls])
    assert actual["router"] == pytest.approx(router, rel=1e-3)


def test_patches_of_crops_are_compared_with_students_of_every_family() -> None:
    loss = {"identity": 0, "relation": 0, "crop_patches": True}
    swin = built("dpal", loss=loss, student={"name": "swin_tiny"}, decoder={"patterns": 2})
    assert np.isfinite(terms(swin, made_batch(size=2))["shape"])
