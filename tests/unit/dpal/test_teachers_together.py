"""Several teachers: the mean of their losses, and who teaches which image in which step."""

import numpy as np
import pytest
import torch

from dpal.chance import generator
from dpal.task import Losses, Task

from made_task import (
    TEACHER,
    MadeTargets,
    made_batch,
    made_recipe,
    moment,
    task_of,
)

OTHERS = [{**TEACHER, "tap": "block3"}, {**TEACHER, "tap": "block4"}]
SOURCES = (MadeTargets(0, 24), MadeTargets(1, 36, scale=1.3), MadeTargets(2, 24, scale=0.8))


def together(method: str, drop: float, sources: tuple[MadeTargets, ...] = SOURCES) -> Task:
    others = OTHERS[: len(sources) - 1]
    loss = {"teacher_drop": drop, "targets": "standardised" if drop else "raw"}
    return task_of(made_recipe(method, more_teachers=others, loss=loss), *sources)


def alone(method: str, task: Task, teacher: int) -> Task:
    """One teacher with the student and the decoder that it has among several."""
    single = task_of(made_recipe(method), SOURCES[teacher])
    single.student.load_state_dict(task.student.state_dict())
    single.decoder[0].load_state_dict(task.decoder[teacher].state_dict())
    return single


@pytest.mark.parametrize("method", ["dpal", "proteus", "mse"])
def test_without_dropping_the_total_is_the_mean_of_the_teachers_alone(method: str) -> None:
    sources = SOURCES[:2]
    task, batch = together(method, 0.0, sources), made_batch(size=2)
    losses = task(batch, moment(5))
    singles = [alone(method, task, teacher)(batch, moment(5)) for teacher in range(2)]
    mean = torch.stack([single.terms for single in singles]).mean(dim=0)
    assert torch.allclose(losses.terms, mean, rtol=1e-4)
    assert losses.diagnostics["teacher_loss"].shape == (2,)


def image_losses(task: Task, step: int) -> np.ndarray:
    """Loss of every teacher on every image, from batches of one image [3, 4]."""
    columns = []
    for image in range(4):
        losses: Losses = task(made_batch(image, 1), moment(step))
        columns.append(losses.diagnostics["teacher_loss"].double().numpy())
    return np.stack(columns, axis=1)


def kept(table: np.ndarray, seed: int, step: int, p: float) -> np.ndarray:
    """UNIC's rule for samples "0" to "3", as a loop."""
    mask = np.zeros_like(table)
    for image in range(4):
        draws = generator(seed, "teacher-drop", str(image), step).random(3)
        for teacher in range(3):
            worst = table[teacher, image] == table[:, image].max()
            mask[teacher, image] = worst or draws[teacher] >= p
    return mask


def test_dropping_leaves_out_teachers_image_by_image() -> None:
    task = together("mse", 0.6)
    seen = set()
    for step in range(3):
        table = image_losses(task, step)
        mask = kept(table, task.seed, step, 0.6)
        total = task(made_batch(), moment(step)).total
        assert total.item() == pytest.approx((mask * table).mean(), rel=1e-4)
        assert 0 < mask.sum() < 12
        seen.add(mask.tobytes())
    assert len(seen) == 3, "another step drops others"


def test_a_teacher_that_is_left_out_of_an_image_teaches_nothing_from_it() -> None:
    task = together("mse", 0.6)
    step, image, teacher = next(
        (step, int(column), int(row))
        for step in range(20)
        for row, column in np.argwhere(kept(image_losses(task, step), task.seed, step, 0.6) == 0)
    )
    task(made_batch(image, 1), moment(step)).total.backward()
    gradients = [sum(float(p.grad.abs().sum()) for p in head.parameters()) for head in task.decoder]
    assert gradients[teacher] == 0
    assert max(gradients) > 0


def test_a_batch_cut_in_two_drops_the_same() -> None:
    task = together("mse", 0.6)
    whole = task(made_batch(), moment(4)).terms
    halves = torch.stack([task(made_batch(first, 2), moment(4)).terms for first in (0, 2)])
    assert torch.allclose(whole, halves.mean(dim=0), rtol=1e-4)


def test_one_teacher_is_never_dropped() -> None:
    losses = task_of(made_recipe("mse"))(made_batch(size=2), moment())
    assert losses.terms[0] == pytest.approx(losses.terms[1:].sum().item(), rel=1e-5)
