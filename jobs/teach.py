"""Teach the embedded teacher: a small ViT learns identity, looks and parts of synthetic persons.

Only pretraining identities are seen (`synthetic/teach/`). The state is kept every `SAVE_EVERY`
steps and batches are pure functions of (seed, step), so a killed run goes on unchanged.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data_tools.synthetic import ATTRIBUTES, PARTS, dataset_rule, write_dataset
from dpal.base.errors import ConfigError, StopRequested, StorageError
from dpal.base.layout import RunLayout
from dpal.base.memory import keep_freed_memory
from dpal.base.progress import Progress
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal
from dpal.base.teachers import IMAGENET_MEAN, IMAGENET_STD, TaughtTeacher
from dpal.model.attention import suit_attention
from dpal.model.taught import Taught, TaughtLosses, Trait, arch_of
from jobs.stage import StageResult
from jobs.teach_data import TeachBatch, TeachSet

TEACHING_VERSION = 1  # raise it whenever the same recipe would give other weights
SAVE_EVERY = 100
WARMUP = 0.1
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.98), 0.05, 3.0


def run(recipe: Recipe) -> StageResult:
    """Write `teacher/teacher.safetensors` unless it is there or no teacher is a taught one.

    Raises:
        ConfigError: two taught teachers in one recipe.
        StopRequested: on a stop signal, with the state saved.
        StorageError: when the run folder cannot be written.
    """
    taught = [one for one in recipe.teachers if isinstance(one, TaughtTeacher)]
    if len(taught) > 1:
        raise ConfigError(f"{len(taught)} teachers have kind=taught; accepted is one in a recipe")
    if not taught:
        kinds = " and ".join(repr(teacher.kind) for teacher in recipe.teachers) or "none"
        return StageResult("teach", True, f"not needed: teacher.kind is {kinds}")
    spec = taught[0]
    recipe = recipe.with_teacher(spec)
    layout = RunLayout(recipe.run_dir)
    digest = teaching_digest(recipe)
    if _metadata(layout.teacher).get("digest") == digest:
        return StageResult("teach", True, f"{layout.teacher} is up to date")
    write_dataset(layout.synthetic, recipe.data.synthetic, recipe.seed)
    keep_freed_memory()
    lesson = _Lesson(recipe, spec, TeachSet(layout.synthetic / "teach"))
    state = layout.teacher.with_name("state.safetensors")
    try:
        layout.teacher.parent.mkdir(parents=True, exist_ok=True)
        lesson.load(state, digest)
        with StopSignal.listening() as stop:
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
            self.model = Taught(arch, persons.num_identities, len(PARTS), _traits())
        blocks = [p for p in self.model.vit.blocks.parameters() if p.ndim == 2]
        hidden = {id(parameter) for parameter in blocks}
        others = [p for p in self.model.parameters() if id(p) not in hidden]
        # Muon turns the blocks' matrices; a ViT of this size learns in far fewer steps with it.
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                blocks, lr=0.0, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=0.0, betas=BETAS, weight_decay=0.0),
        )

    def advance(self) -> TaughtLosses:
        """One optimiser step."""
        spec = self.spec
        batch = self.persons.batch(
            self.recipe.seed, self.step, spec.global_batch, self.recipe.views
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * _schedule(self.step, spec.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            suit_attention(self.model.vit, torch.device("cpu"))
            losses: TaughtLosses = self.model(_normalised(batch), batch.labels)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return TaughtLosses(*(term.detach() for term in losses))

    def save(self, path: Path, digest: str) -> None:
        """Write the state aside and publish it by one rename."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                for name, value in moments.items():
                    tensors[f"optimizer.{number}.{index}.{name}"] = value
        _publish(path, tensors, digest=digest, step=str(self.step))

    def load(self, path: Path, digest: str) -> None:
        """Go on from a saved state of the same lesson; anything else there is ignored."""
        found = _metadata(path)
        if found.get("digest") != digest:
            return
        tensors = load_file(path)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k[0] == "m"}
        self.model.load_state_dict(weights)
        moments: tuple[dict[int, dict[str, Tensor]], ...] = tuple({} for _ in self.optimizers)
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, index, name = key.split(".")
                moments[int(number)].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(self.optimizers, moments, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = int(found["step"])


def _teach(
    lesson: _Lesson, steps: int, state: Path, digest: str, stop: StopSignal
) -> TaughtLosses | None:
    losses = None
    with Progress("teach", steps, "step", initial=lesson.step) as progress:
        while lesson.step < steps:
            losses = lesson.advance()
            progress.advance(
                note=f"identity {losses.identity:.2f} metric {losses.metric:.2f} "
                f"parts {losses.parts:.2f} attributes {losses.attributes:.2f}"
            )
            if lesson.step == steps:
                break
            if stop:
                lesson.save(state, digest)
                raise StopRequested(f"teaching stopped on request at step {lesson.step}")
            if lesson.step % SAVE_EVERY == 0:
                lesson.save(state, digest)
    return losses


def _traits() -> tuple[Trait, ...]:
    return tuple(
        Trait(attribute.num_values, tuple(PARTS.index(part) for part in attribute.parts))
        for attribute in ATTRIBUTES
    )


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
    data = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    try:
        aside.write_bytes(_ordered(data))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _ordered(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted.

    The library writes metadata in a random order, and the file's hash names the target cache.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
