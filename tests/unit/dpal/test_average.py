"""The moving average follows its formula, is not trained, and starts as a copy."""

import copy

import pytest
import torch
from torch import nn

from dpal.average import MovingAverage

from made_task import made_batch, made_recipe, moment, task_of


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_it_is_the_weighted_sum_of_everything_it_has_followed() -> None:
    followed = network()
    average = MovingAverage(followed, 0.9)
    values = [followed[0].weight.detach().double().clone()]
    for step in range(4):
        with torch.no_grad():
            followed[0].weight.add_(torch.randn(3, 4))
            followed[1].running_mean.fill_(step)
        values.append(followed[0].weight.detach().double().clone())
        average.update(followed)
    # a_n = m^n p_0 + sum_i (1 - m) m^(n - i) p_i
    expected = 0.9**4 * values[0]
    expected += sum(0.1 * 0.9 ** (4 - i) * value for i, value in enumerate(values) if i)
    assert torch.allclose(average.network[0].weight.double(), expected, atol=1e-6)
    assert average.network[1].running_mean.tolist() == [3.0] * 3  # buffers are copied


def test_another_momentum_counts_for_one_update() -> None:
    followed = network()
    average = MovingAverage(followed, 0.5)
    with torch.no_grad():
        followed[0].weight.zero_()
    before = average.network[0].weight.clone()
    average.update(followed, momentum=1.0)
    assert torch.equal(average.network[0].weight, before)
    average.update(followed, momentum=0.0)
    assert torch.equal(average.network[0].weight, followed[0].weight)


def test_it_is_frozen_and_independent_of_what_it_follows() -> None:
    followed = network()
    average = MovingAverage(followed, 0.9)
    assert not any(p.requires_grad for p in average.parameters())
    assert not average.network.training
    nn.ModuleList([average]).train()
    assert not average.network.training
    with torch.no_grad():
        followed[0].weight.fill_(7)
    assert not (average.network[0].weight == 7).any()


@pytest.mark.parametrize("method", ["mse", "proteus"])
def test_a_task_keeps_an_average_of_its_student_and_restores_it(method: str) -> None:
    recipe = made_recipe(method, train={"ema": 0.75})
    task = task_of(recipe)
    start = copy.deepcopy(task.student.state_dict())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(made_batch(size=2), moment()).total.backward()
    optimizer.step()
    task.after_step(moment())
    assert task.average is not None
    for name, value in task.average.network.state_dict().items():
        expected = 0.75 * start[name] + 0.25 * task.student.state_dict()[name]
        assert torch.allclose(value, expected, atol=1e-6), name
    names = task.state_dict().keys()
    assert {name.partition(".")[0] for name in names} == {"student", "decoder", "average"}
    again = task_of(recipe)
    again.load_state_dict(task.state_dict(), strict=True)
    assert again.average is not None
    for mine, theirs in zip(again.average.parameters(), task.average.parameters(), strict=True):
        assert torch.equal(mine, theirs)
