"""Gradient cosines against analytic and finite-difference values; routers only where they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dpal.base.errors import ConfigError
from dpal.base.losses import Loss
from dpal.diagnose import LEVELS, WHOLE, block_of, gradient_cosines
from dpal.task import Losses, Task

from made_task import made_batch, made_recipe, moment, task_of

PAIRS = ["identity-shape", "identity-relation", "shape-relation"]


class Quadratic(nn.Module):
    """L_l = |theta - c_l|^2 / 2 over two blocks, so that the gradient is theta - c_l."""

    def __init__(self, centres: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.blocks = nn.ModuleList(nn.Linear(3, 1, bias=False) for _ in range(2))
        self.centres, self.weights = centres, Loss(identity=0.3, shape=2.0, relation=0.7)

    def forward(self, batch: object, moment: object) -> Losses:
        theta = torch.cat([block.weight.flatten() for block in self.student.blocks])
        total = theta.sum() * 0
        for level, centre in self.centres.items():
            error = theta - torch.from_numpy(centre).float()
            total = total + getattr(self.weights, level) * (error**2).sum() / 2
        return Losses(total, total.detach().view(1), {})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_cosines_are_those_of_the_gradients_of_each_loss_alone() -> None:
    rng = np.random.default_rng(3)
    task = Quadratic({level: rng.normal(size=6) for level in LEVELS})
    before, batch = task.weights, SimpleNamespace(keys=("a", "b"))
    found = gradient_cosines(task, [batch, batch, batch], moment())
    theta = np.concatenate([b.weight.detach().numpy().ravel() for b in task.student.blocks])
    pulls = {level: theta - centre for level, centre in task.centres.items()}
    for pair in PAIRS:
        a, b = (pulls[level] for level in pair.split("-"))
        assert found.cosines[pair][WHOLE] == pytest.approx(cosine(a, b), abs=1e-5)
        assert found.cosines[pair]["blocks.1"] == pytest.approx(cosine(a[3:], b[3:]), abs=1e-5)
    for level, pull in pulls.items():
        assert found.norms[level] == pytest.approx(float(np.linalg.norm(pull)), rel=1e-5)
    assert (found.num_batches, found.num_images) == (3, 6)
    assert task.weights is before
    assert all(p.grad is None for p in task.parameters())


@pytest.fixture(scope="module", params=["dynamic", "linear"])
def task(request: pytest.FixtureRequest) -> Task:
    torch.set_num_threads(1)
    return task_of(made_recipe(decoder={"kind": request.param}))


def test_a_step_along_one_gradient_changes_the_other_loss_as_the_cosine_says(task: Task) -> None:
    """d L_shape along g_identity / |g_identity| = |g_shape| cos(identity, shape)."""
    batch, parameters = made_batch(), list(task.student.parameters())
    found = gradient_cosines(task, [batch], moment())

    def value(level: str) -> torch.Tensor:
        with torch.no_grad():
            return task(batch, moment()).terms[task.terms.index(level)].double()

    task.weights, weights = Loss(identity=1, shape=0, relation=0, router=0, expert=0), task.weights
    task.zero_grad()
    task(batch, moment()).total.backward()
    task.weights = weights
    pulls = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    task.zero_grad()
    norm = float(torch.sqrt(sum((pull.double() ** 2).sum() for pull in pulls)))
    assert found.norms["identity"] == pytest.approx(norm, rel=1e-3)
    step, values = 2e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, pull in zip(parameters, pulls, strict=True):
                parameter += sign * step / norm * pull
            values.append(value("shape"))
            for parameter, pull in zip(parameters, pulls, strict=True):
                parameter -= sign * step / norm * pull
    slope = float(values[0] - values[1]) / (2 * step)
    expected = found.norms["shape"] * found.cosines["identity-shape"][WHOLE]
    assert slope == pytest.approx(expected, rel=0.05, abs=0.01 * found.norms["shape"])


def test_router_and_experts_are_told_of_where_there_are_any(task: Task) -> None:
    found = gradient_cosines(task, [made_batch(), made_batch(4)], moment())
    assert list(found.cosines) == PAIRS
    assert {f"blocks.{i}" for i in range(12)} <= found.cosines["identity-shape"].keys()
    if task.decoder[0].__class__.__name__ == "LinearDecoder":
        assert (found.router_entropy, found.expert_similarity) == (None, None)
        return
    told = [task(b, moment()).diagnostics for b in (made_batch(), made_batch(4))]
    for name in ("router_entropy", "expert_similarity"):
        mean = sum(float(one[name]) for one in told) / 2
        assert getattr(found, name) == pytest.approx(mean, rel=1e-4)


def test_a_loss_that_is_not_trained_is_left_out() -> None:
    task = task_of(made_recipe(loss={"relation": 0}, decoder={"kind": "linear"}))
    found = gradient_cosines(task, [made_batch(size=2)], moment())
    assert list(found.cosines) == ["identity-shape"]
    assert list(found.norms) == ["identity", "shape"]


def test_a_method_without_the_losses_is_refused() -> None:
    with pytest.raises(ConfigError, match="accepted are method"):
        gradient_cosines(task_of(made_recipe("proteus")), [made_batch()], moment())


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        gradient_cosines(task_of(made_recipe("mse")), [], moment())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("blocks.11.norm1.bias", "blocks.11"),
        ("layers_0.blocks.1.mlp.fc1.weight", "layers_0"),
        ("patch_embed.proj.weight", "patch_embed"),
        ("cls_token", "cls_token"),
    ],
)
def test_a_parameter_belongs_to_its_outermost_block(name: str, block: str) -> None:
    assert block_of(name) == block
