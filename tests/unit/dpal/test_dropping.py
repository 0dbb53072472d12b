"""Teacher dropping: the worst matched teacher always teaches, draws depend on nothing else."""

import numpy as np
import torch

from dpal.chance import generator
from dpal.dropping import kept_teachers

KEYS = [f"person-{index}" for index in range(2000)]


def losses(teachers: int, images: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.random((teachers, images)).astype(np.float32))


def kept(values: torch.Tensor, keys: list[str], p: float = 0.5, seed: int = 3, step: int = 7):
    return kept_teachers(values, keys, probability=p, seed=seed, step=step)


def test_it_is_the_rule_written_as_a_loop() -> None:
    values = losses(3, 40)
    expected = np.zeros((3, 40))
    for image in range(40):
        worst = max(range(3), key=lambda teacher: float(values[teacher, image]))
        draws = generator(3, "teacher-drop", KEYS[image], 7).random(3)
        for teacher in range(3):
            expected[teacher, image] = teacher == worst or not draws[teacher] < 0.3
    assert np.array_equal(kept(values, KEYS[:40], p=0.3).numpy(), expected)


def test_the_worst_matched_teacher_always_teaches_and_others_half_the_time() -> None:
    values = losses(4, 2000)
    mask = kept(values, KEYS).bool()
    worst = torch.zeros_like(mask).scatter_(0, values.argmax(0, keepdim=True), True)
    assert mask[worst].all()
    share = float(mask[~worst].float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / 6000**0.5  # four deviations of 6000 fair draws


def test_neither_batch_nor_order_changes_what_is_dropped() -> None:
    values = losses(2, 60)
    whole = kept(values, KEYS[:60])
    parts = [kept(values[:, i : i + 20], KEYS[i : i + 20]) for i in range(0, 60, 20)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    order = torch.randperm(60)
    shuffled = kept(values[:, order], [KEYS[int(i)] for i in order])
    assert torch.equal(shuffled, whole[:, order])


def test_another_step_or_seed_draws_anew_and_zero_drops_nothing() -> None:
    values = losses(2, 200)
    once = kept(values, KEYS[:200])
    assert torch.equal(kept(values, KEYS[:200]), once)
    assert not torch.equal(kept(values, KEYS[:200], step=8), once)
    assert not torch.equal(kept(values, KEYS[:200], seed=4), once)
    assert kept(values, KEYS[:200], p=0.0).all()


def test_one_teacher_is_never_dropped() -> None:
    assert kept(losses(1, 50), KEYS[:50], p=0.9).all()
