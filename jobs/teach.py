"""Teach the embedded teacher: a small ViT learns identity and parts of the synthetic persons.

Only pretraining identities are seen (`synthetic/teach/`). The state is kept every `SAVE_EVERY`
steps and batches are pure functions of (seed, step), so a killed run goes on unchanged.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_tools.synthetic import PARTS, dataset_rule, write_dataset
from dpal.base.errors import StopRequested, StorageError
from dpal.base.layout import RunLayout
from dpal.base.progress import Progress
from dpal.base.recipe import IMAGENET_MEAN, IMAGENET_STD, Recipe, TaughtTeacher
from dpal.model.taught import Taught, TaughtLosses, arch_of
from jobs.stage import StageResult
from jobs.teach_data import TeachBatch, TeachSet

TEACHING_VERSION = 1  # raise it whenever the same recipe would give other weights
SAVE_EVERY = 100
WARMUP = 0.1
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.98), 0.05, 3.0


def run(recipe: Recipe, *, stop: Callable[[], bool] = lambda: False) -> StageResult:
    """Write `teacher/teacher.safetensors` unless it is there or the recipe brings its own teacher.

    Args:
        stop: read between two steps; when it becomes true the state is saved and the stage ends.

    Raises:
        StopRequested: when `stop` said so.
        StorageError: when the run folder cannot be written.
    """
    spec = recipe.teacher
    if not isinstance(spec, TaughtTeacher):
        return StageResult("teach", True, f"not needed: teacher.kind is {spec.kind!r}")
    layout = RunLayout(recipe.run_dir)
    digest = teaching_digest(recipe)
    if _metadata(layout.teacher).get("digest") == digest:
        return StageResult("teach", True, f"{layout.teacher} is up to date")
    write_dataset(layout.synthetic, recipe.data.synthetic, recipe.seed)
    lesson = _Lesson(recipe, spec, TeachSet(layout.synthetic / "teach"))
    state = layout.teacher.with_name("state.safetensors")
    try:
        layout.teacher.parent.mkdir(parents=True, exist_ok=True)
        lesson.load(state, digest)
        losses = _teach(lesson, spec.steps, state, digest, stop)
        arch = json.dumps(arch_of(spec, (recipe.views.height, recipe.views.width)))
        _publish(layout.teacher, lesson.model.vit.state_dict(), arch=arch, digest=digest)
        state.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"teacher folder {str(layout.teacher.parent)!r} cannot be written: {error.strerror}"
        ) from None
    ended = (
        f", identity loss {losses.identity:.3f}, parts loss {losses.parts:.3f}" if losses else ""
    )
    return StageResult("teach", False, f"{spec.steps} steps{ended}")


def teaching_digest(recipe: Recipe) -> str:
    """First 16 hex digits of the SHA-256 of everything that decides the taught weights."""
    decides = {
        "version": TEACHING_VERSION,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"batch_size"}),
        "data": dataset_rule(recipe.data.synthetic, recipe.seed),
        "views": recipe.views.model_dump(mode="json", include={"height", "width", "aspect"}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


class _Lesson:
    """Model, optimiser and step: everything that must survive a kill."""

    def __init__(self, recipe: Recipe, spec: TaughtTeacher, persons: TeachSet) -> None:
        self.recipe, self.spec, self.persons, self.step = recipe, spec, persons, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            arch = arch_of(spec, (recipe.views.height, recipe.views.width))
            self.model = Taught(arch, persons.num_identities, len(PARTS))
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        free = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def advance(self) -> TaughtLosses:
        """One optimiser step."""
        spec = self.spec
        batch = self.persons.batch(
            self.recipe.seed, self.step, spec.global_batch, self.recipe.views
        )
        for group in self.optimizer.param_groups:
            group["lr"] = spec.lr * _schedule(self.step, spec.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            losses: TaughtLosses = self.model(_normalised(batch), batch.identities, batch.parts)
        self.optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.step += 1
        return TaughtLosses(*(term.detach() for term in losses))

    def save(self, path: Path, digest: str) -> None:
        """Write the state aside and publish it by one rename."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        _publish(path, tensors, digest=digest, step=str(self.step))

    def load(self, path: Path, digest: str) -> None:
        """Go on from a saved state of the same lesson; anything else there is ignored."""
        found = _metadata(path)
        if found.get("digest") != digest:
            return
        tensors = load_file(path)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k[0] == "m"}
        self.model.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = int(found["step"])


def _teach(
    lesson: _Lesson, steps: int, state: Path, digest: str, stop: Callable[[], bool]
) -> TaughtLosses | None:
    losses = None
    with Progress("teach", steps, "step", initial=lesson.step) as progress:
        while lesson.step < steps:
            losses = lesson.advance()
            progress.advance(
                note=f"identity {losses.identity:.2f} metric {losses.metric:.2f} "
                f"parts {losses.parts:.2f}"
            )
            if lesson.step == steps:
                break
            if stop():
                lesson.save(state, digest)
                raise StopRequested(f"teaching stopped on request at step {lesson.step}")
            if lesson.step % SAVE_EVERY == 0:
                lesson.save(state, digest)
    return losses


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then half a cosine to 1 % of the peak."""
    warmup = max(int(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def _normalised(batch: TeachBatch) -> Tensor:
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (batch.pixels - mean) / std


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # absent or cut off: as good as not there


def _publish(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside, metadata)
        os.replace(aside, path)
    except SafetensorError as error:
        raise StorageError(f"{path} cannot be written: {error}") from None
    finally:
        aside.unlink(missing_ok=True)
