"""What the losses do to the student, and the router and experts to each other.

    cos(a, b) = g_a . g_b / (|g_a| |g_b|),   g_l = d L_l / d theta

with theta the student's parameters, L_l one alignment loss alone (weight 1, all others and the
steering terms 0). Negative values mean that two losses pull the student apart; whether the dynamic
decoder lessens that is what this is for. One backward per loss on the same batches, in float32.

Legend: K patterns.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpal.base.errors import ConfigError
from dpal.batch import Batch
from dpal.task import Moment, Task

LEVELS = ("identity", "shape", "relation")
STEERING = ("router", "router_late", "expert")
WHOLE = "student"  # name of all parameters together, beside the blocks


class Diagnosis(NamedTuple):
    """Means over batches.

    Attributes:
        cosines: for every pair of losses ("identity-shape"), the cosine of their gradients by
            block of the student; `student` is over all parameters. A block that one of the losses
            does not reach has none.
        norms: for every loss, the gradient's norm over all parameters.
        router_entropy: of the router's choice, in nats; None without a router. ln K: undecided.
        expert_similarity: mean cosine between two experts of an image; None without experts.
        num_batches: batches that were looked at.
        num_images: images in them.
    """

    cosines: Mapping[str, Mapping[str, float]]
    norms: Mapping[str, float]
    router_entropy: float | None
    expert_similarity: float | None
    num_batches: int
    num_images: int


def gradient_cosines(task: Task, batches: Iterable[Batch], moment: Moment) -> Diagnosis:
    """Diagnose a task on batches that were rendered for it; its parameters stay as they are.

    Args:
        task: with weights for identity, shape and relation; those of weight 0 are left out.
        moment: where in the run the batches are looked at (random choices depend on it).

    Raises:
        ConfigError: the method has no such losses.
        ValueError: there is no batch.
    """
    levels = levels_of(task)
    pairs = list(combinations(levels, 2))
    cosines: dict[str, dict[str, list[float]]] = {f"{a}-{b}": {} for a, b in pairs}
    norms: dict[str, list[float]] = {level: [] for level in levels}
    routing: dict[str, list[float]] = {"router_entropy": [], "expert_similarity": []}
    num_images = 0
    for batch in batches:
        num_images += len(batch.keys)
        gradients = {level: _gradient(task, batch, moment, level) for level in levels}
        for level in levels:
            norms[level].append(float(gradients[level][WHOLE].norm()))
        for a, b in pairs:
            for block, value in _cosines(gradients[a], gradients[b]).items():
                cosines[f"{a}-{b}"].setdefault(block, []).append(value)
        with torch.no_grad():
            told = task(batch, moment).diagnostics
        for name, values in routing.items():
            values += [float(told[name])] if name in told else []
    if not num_images:
        raise ValueError("there is no batch to diagnose")
    return Diagnosis(
        {pair: {b: _mean(v) for b, v in blocks.items()} for pair, blocks in cosines.items()},
        {level: _mean(values) for level, values in norms.items()},
        *(_mean(values) if values else None for values in routing.values()),
        num_batches=len(norms[levels[0]]),
        num_images=num_images,
    )


def levels_of(task: Task) -> tuple[str, ...]:
    """The alignment losses that a task is trained with. Raises ConfigError without any."""
    weights = getattr(task, "weights", None)
    levels = tuple(level for level in LEVELS if getattr(weights, level, 0) > 0)
    if not levels:
        raise ConfigError(
            "the method has no identity, shape or relation loss to diagnose; accepted are "
            "method.kind=dpal and method.kind=mse"
        )
    return levels


@contextmanager
def only(task: Task, level: str) -> Iterator[None]:
    """Within: the task's loss is `level` alone, with weight 1."""
    before = task.weights
    silent = {name: 0.0 for name in (*LEVELS, *STEERING) if hasattr(before, name)}
    task.weights = before.model_copy(update={**silent, level: 1.0})
    try:
        yield
    finally:
        task.weights = before


def block_of(name: str) -> str:
    """The block of a parameter: its name up to the first number, else its first word.

    `blocks.3.attn.qkv.weight` is of `blocks.3`, `patch_embed.proj.weight` of `patch_embed`.
    """
    found = re.match(r"(.*?[._]\d+)(?:\.|$)", name)
    return found[1] if found else name.partition(".")[0]


def _gradient(task: Task, batch: Batch, moment: Moment, level: str) -> dict[str, Tensor]:
    """Flat gradient of one loss by block of the student, and of all of it; zero if unreached."""
    named = [(n, p) for n, p in _parameters(task.student) if p.requires_grad]
    with only(task, level), torch.enable_grad():
        total = task(batch, moment).total
        parts = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    blocks: dict[str, list[Tensor]] = {}
    for (name, parameter), part in zip(named, parts, strict=True):
        flat = torch.zeros_like(parameter) if part is None else part
        blocks.setdefault(block_of(name), []).append(flat.flatten().double())
    joined = {block: torch.cat(values) for block, values in blocks.items()}
    return {WHOLE: torch.cat(list(joined.values())), **joined}


def _parameters(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names without the wrappers that all parameters share."""
    named = list(student.named_parameters())
    names = [name.split(".") for name, _ in named]
    shared = 0
    while all(
        len(n) > shared + 1 and n[shared] == names[0][shared] and not n[shared + 1].isdigit()
        for n in names
    ):
        shared += 1
    return ((".".join(n[shared:]), p) for n, (_, p) in zip(names, named, strict=True))


def _cosines(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    norms = {block: float(a[block].norm() * b[block].norm()) for block in a}
    return {block: float(a[block] @ b[block]) / n for block, n in norms.items() if n > 0}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
