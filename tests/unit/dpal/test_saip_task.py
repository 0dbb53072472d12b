"""SAIP learns, is independent of how a batch is cut, and goes on after a checkpoint."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.backgrounds import BackgroundPool
from data_tools.order import Place
from data_tools.saip_samples import SaipSamples
from data_tools.sample import Sample
from data_tools.synthetic import draw_background, draw_person
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe
from dpal.base.saip import Saip
from dpal.method.saip import SaipTask, expert_momentum
from dpal.model.timm_import import timm
from dpal.saip.batch import SaipBatch
from dpal.saip.views import SaipPlan
from dpal.task import Losses, Moment

SMALL = {
    "kind": "saip",
    "local_crops": 2,
    "prototypes": 256,
    "hidden": 64,
    "bottleneck": 256,
    "decoder_width": 64,
    "decoder_depth": 1,
    "decoder_heads": 4,
}


def recipe_of(method: Any = None, **sections: Any) -> Recipe:
    return resolve_recipe(
        {
            "name": "saip",
            "data": {"images": ["persons"]},
            "views": {"height": 128, "width": 64},
            "method": SMALL if method is None else method,
            "student": {"height": 128, "width": 64, "heads": "timm"},
            "train": {"global_batch": 4, "micro_batch": 4, "precision": "fp32"},
            **sections,
        }
    )


def moment_of(step: int) -> Moment:
    return Moment(step=step, total_steps=30, num_samples=12, global_batch=4)


@functools.cache
def person(number: int) -> np.ndarray[Any, Any]:
    return draw_person(0, number % 4, number).image


class Persons:
    """A shard of drawn persons."""

    keys = tuple(f"{number:08x}" for number in range(64))

    def __len__(self) -> int:
        return len(self.keys)


PERSONS = Persons()


def batch_of(recipe: Recipe, numbers: list[int], epoch: int = 0) -> SaipBatch:
    assert isinstance(recipe.method, Saip)
    plan = SaipPlan(recipe.seed + recipe.train.seed, recipe.views, recipe.method.local_crops)
    pool = BackgroundPool(tuple(draw_background(0, i, (128, 128)) for i in range(2)), "")
    builder = SaipSamples(plan, pool).start(len(numbers))
    for row, number in reversed(list(enumerate(numbers))):
        place = Place(epoch=epoch, shard=0, row=number)
        builder.fill(row, Sample(PERSONS, place, lambda _shard, number, _out: person(number)))
    return builder.finish()


def step(task: SaipTask, batches: list[SaipBatch], at: Moment, rate: float = 0.0) -> list[Losses]:
    """One optimiser step (plain SGD, or none at rate 0) over some micro-batches."""
    results = [task(batch, at) for batch in batches]
    if rate:
        optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=rate)
        (sum(result.total for result in results) / len(results)).backward()
        optimizer.step()
        optimizer.zero_grad()
    task.after_step(at)
    return results


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_of()


def test_rows_do_not_depend_on_their_batch(recipe: Recipe) -> None:
    both, one = batch_of(recipe, [0, 1]), batch_of(recipe, [1])
    assert both.keys[1:] == one.keys
    for name in ("globals", "locals", "background", "corners", "photometric"):
        assert np.array_equal(getattr(both, name)[1:], getattr(one, name)), name
    later = batch_of(recipe, [1], epoch=1)
    assert not np.array_equal(later.globals, one.globals)
    assert not np.array_equal(later.locals, one.locals)


def test_noise_can_be_switched_off() -> None:
    views = {"height": 128, "width": 64, "photometric": "off"}
    noise = batch_of(recipe_of(views=views), [0]).photometric
    assert np.array_equal(np.unique(noise, axis=1)[0, 0], [1, 1, 1, 0, 0, 0, 0])


def test_thirty_steps_on_persons_lower_the_loss(recipe: Recipe) -> None:
    task = SaipTask(recipe)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    rows = []
    for number in range(30):
        losses = task(batch_of(recipe, [0, 1], epoch=number), moment_of(number))
        losses.total.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1, (number + 1) / 10)
        optimizer.step()
        optimizer.zero_grad()
        task.after_step(moment_of(number))
        rows.append(losses.terms)
    early, late = torch.stack(rows[:5]).mean(dim=0), torch.stack(rows[-5:]).mean(dim=0)
    fall = dict(zip(task.terms, (early - late).tolist(), strict=True))
    assert fall["loss"] > 0.1
    assert fall["reconstruction"] > 0.05
    assert fall["instance"] > 0.05
    assert fall["region"] > 0.05
    # At first the centre evens out the expert's choices, towards ln K; no collapse to one.
    assert early[1] < late[1] < math.log(256)
    # The expert starts as the student, so their attention can only part.
    assert rows[0][2].abs() < 1e-5 < late[2]


def test_matching_learns_what_a_still_expert_says(recipe: Recipe) -> None:
    task, batch = SaipTask(recipe), batch_of(recipe, [0, 1])
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-4)
    values = []
    for _ in range(8):
        losses = task(batch, moment_of(0))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(losses.terms[1].item())
    assert values[-1] < values[0] - 0.2


def test_cutting_a_batch_changes_neither_losses_nor_what_follows_them(recipe: Recipe) -> None:
    whole, parts = SaipTask(recipe), SaipTask(recipe)
    (once,) = step(whole, [batch_of(recipe, [0, 1, 2, 3])], moment_of(2))
    halves = step(parts, [batch_of(recipe, [0, 1]), batch_of(recipe, [2, 3])], moment_of(2))
    mean = torch.stack([half.terms for half in halves]).mean(dim=0)
    assert torch.allclose(once.terms, mean, atol=1e-4)
    assert torch.allclose(whole.decoder.centre, parts.decoder.centre, atol=1e-6)


def test_the_centre_follows_the_mean_of_the_experts_logits(recipe: Recipe) -> None:
    task = SaipTask(recipe)
    batch = batch_of(recipe, [0, 1])
    inputs = task._inputs(batch)
    logits = task._ask_expert(inputs).logits.double().numpy()
    task._seen_logits.clear()
    expected = np.zeros(256)
    for _ in range(2):  # the weights are not changed in between
        step(task, [batch], moment_of(0))
        expected = 0.9 * expected + 0.1 * logits.mean(axis=(0, 1))
    assert np.allclose(task.decoder.centre, expected, atol=1e-6)


def test_the_centre_is_the_mean_over_ranks(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    task, other = SaipTask(recipe), torch.linspace(-1, 1, 256)
    task._seen_logits.append(torch.full((256,), 0.5))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.add_(other))
    task.after_step(moment_of(0))
    assert torch.allclose(task.decoder.centre, 0.1 * (0.5 + other) / 2)


def test_the_expert_follows_the_student_and_has_no_gradient(recipe: Recipe) -> None:
    task = SaipTask(recipe)
    before = {k: v.clone() for k, v in task.decoder.expert.state_dict().items()}
    step(task, [batch_of(recipe, [0, 1])], moment_of(0), rate=0.1)
    momentum = expert_momentum(task.spec, moment_of(0))
    followed = {"student": task.student, "middle_norm": task.decoder.middle_norm}
    followed["head"] = task.decoder.head
    moved = 0
    for part, network in followed.items():
        for name, value in network.state_dict().items():
            key = f"{part}.network.{name}"
            expected = momentum * before[key] + (1 - momentum) * value
            after = task.decoder.expert.state_dict()[key]
            assert torch.allclose(after, expected, atol=1e-6)
            moved += int(not torch.equal(after, before[key]))
    assert moved > 100
    assert all(p.grad is None and not p.requires_grad for p in task.decoder.expert.parameters())


def test_every_trained_parameter_gets_a_gradient(recipe: Recipe) -> None:
    task = SaipTask(recipe)
    task(batch_of(recipe, [0, 1]), moment_of(1)).total.backward()
    idle = [
        name
        for name, parameter in task.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert idle == []


def test_momentum_rises_over_the_run_or_restarts_every_epoch() -> None:
    whole, epoch = Saip(), Saip(ema_schedule="epoch")
    for done in (0, 7, 29):
        expected = 1 - 0.004 * (math.cos(math.pi * done / 30) + 1) / 2
        assert expert_momentum(whole, moment_of(done)) == pytest.approx(expected)
        inside = 1 - 0.004 * (math.cos(math.pi * (done % 3) / 30) + 1) / 2
        assert expert_momentum(epoch, moment_of(done)) == pytest.approx(inside)
    assert expert_momentum(whole, moment_of(30)) == 1


def test_a_saved_task_goes_on_as_if_it_had_not_stopped(recipe: Recipe, tmp_path: Path) -> None:
    task, batch = SaipTask(recipe), batch_of(recipe, [0, 1])
    step(task, [batch], moment_of(0), rate=0.1)
    state = {name: value.contiguous() for name, value in task.state_dict().items()}
    assert "decoder.centre" in state
    assert any(name.startswith("decoder.expert.student.") for name in state)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "state.safetensors")
    again = SaipTask(recipe)
    assert not torch.equal(again.decoder.centre, task.decoder.centre)
    again.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    results = [step(each, [batch], moment_of(1), rate=0.1)[0].terms for each in (task, again)]
    assert torch.equal(*results)
    assert torch.equal(task.decoder.centre, again.decoder.centre)
    same = zip(task.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_the_kept_student_is_a_plain_timm_vit(recipe: Recipe) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(128, 64))
    student = SaipTask(recipe).student.state_dict()
    assert {k: v.shape for k, v in student.items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_a_bare_word_chooses_saip_at_the_references_sizes() -> None:
    method = recipe_of("saip").method
    assert isinstance(method, Saip)
    assert (method.prototypes, method.hidden, method.bottleneck) == (65536, 2048, 256)
    assert (method.decoder_width, method.decoder_depth, method.decoder_heads) == (512, 8, 16)
    assert (method.mask_ratio, method.local_crops, method.ema) == (0.75, 7, 0.996)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"student": {"name": "swin_tiny", "height": 128, "width": 64}}, "swin_tiny"),
        ({"student": {"height": 128, "width": 64, "drop_path": 0.1}}, "drop_path"),
        ({"views": {"height": 256, "width": 128}}, "views.height=256"),
        ({"train": {"global_batch": 4, "micro_batch": 4, "zero_stage": 3}}, "zero_stage=3"),
        ({"method": {**SMALL, "decoder_heads": 5}}, "decoder_heads=5"),
    ],
)
def test_what_saip_cannot_use_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SaipTask(recipe_of(**sections))
