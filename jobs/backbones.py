"""The frozen backbones of a run: its student, its teacher, and the student before training."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dpal import export
from dpal.base.config import load_recipe
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.base.students import Student as StudentSpec
from dpal.checkpoint import Checkpoint, latest
from dpal.model.student import FrozenStudent, Student, build_student
from dpal.model.teacher import sha256_of, teacher_identity
from dpal.model.tokens import FrozenBackbone
from jobs.caching.plan import single_teacher_recipes, stride_of, teacher_names, teacher_of


class Candidate(NamedTuple):
    """A backbone that can be scored; nothing is loaded before `open` is called.

    Attributes:
        name: `student`, `untrained`, or one of `jobs.caching.plan.teacher_names`.
        model_id: digest of the weights and of everything that decides how they are read.
        view_size: height and width of the pixels it is given.
        open: builds the backbone, once.
        batch_size: images in one forward.
        kept_pictures: folder where decoded images are kept for the next model; None: they are not.
    """

    name: str
    model_id: str
    view_size: tuple[int, int]
    open: Callable[[], FrozenBackbone]
    batch_size: int = 32
    kept_pictures: Path | None = None


def candidates_of(recipe: Recipe) -> list[Candidate]:
    """Student, every teacher and untrained student of a run.

    Raises:
        ConfigError, DataError: no committed checkpoint, or no weights of the teacher.
    """
    return [trained_student(recipe), *teachers_of(recipe), untrained_student(recipe)]


def trained_student(recipe: Recipe) -> Candidate:
    """The student of a run's last checkpoint. Raises DataError without one."""
    return _trained(recipe, _latest(recipe.run_dir))


def teachers_of(recipe: Recipe) -> list[Candidate]:
    """Every teacher of a recipe, in order. Raises ConfigError or DataError."""
    named = zip(single_teacher_recipes(recipe), teacher_names(recipe), strict=True)
    return [_teacher(single, name) for single, name in named]


def untrained_student(recipe: Recipe) -> Candidate:
    """The student with the start values that its training has."""
    size, seed = (recipe.views.height, recipe.views.width), recipe.seed + recipe.train.seed

    def build() -> FrozenBackbone:
        return _frozen(build_student(recipe.student, seed=seed), recipe.views.height)

    spec = recipe.student.model_dump(mode="json")
    return Candidate("untrained", _digest(seed, spec, size), size, cache(build))


def open_model(folder: Path) -> Candidate:
    """The student in a run folder or an export folder. Raises DataError for anything else."""
    if RunLayout(folder).recipe.is_file():
        return _trained(load_recipe(RunLayout(folder).recipe), _latest(folder))
    if (folder / export.CONFIG).is_file():
        return _exported(folder)
    raise DataError(
        f"{str(folder)!r} is neither a run folder (recipe.yaml) nor an export ({export.CONFIG})"
    )


def last_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The last committed checkpoint of a run; None without one."""
    return latest(RunLayout(recipe.run_dir).checkpoints)


def student_of(spec: StudentSpec, found: Checkpoint) -> Student:
    """The trained student of a checkpoint, frozen. Raises DataError when it is damaged."""
    student = build_student(spec)
    path = found.path / "student.safetensors"
    if sha256_of(path) != found.files[path.name]:
        raise DataError(f"checkpoint {found.path}: {path.name} does not match its checksum")
    load_weights(student, path)
    return student.eval().requires_grad_(False)


def _latest(folder: Path) -> Checkpoint:
    checkpoints = RunLayout(folder).checkpoints
    found = latest(checkpoints)
    if found is None:
        raise DataError(f"{checkpoints} has no committed checkpoint; run `dpal train` first")
    return found


def _trained(recipe: Recipe, found: Checkpoint) -> Candidate:
    size = recipe.views.height, recipe.views.width

    def build() -> FrozenBackbone:
        return _frozen(student_of(recipe.student, found), recipe.views.height)

    spec = recipe.student.model_dump(mode="json")
    return Candidate("student", _digest(found.digest, spec, size), size, cache(build))


def _teacher(recipe: Recipe, name: str) -> Candidate:
    """The one teacher of a recipe."""
    size = recipe.views.height, recipe.views.width
    weights = RunLayout(recipe.run_dir).teacher

    def build() -> FrozenBackbone:
        return teacher_of(recipe).to(_device())

    identity = teacher_identity(recipe.teacher, weights, view_size=size)
    model_id = _digest(identity, stride_of(recipe), size)
    return Candidate(name, model_id, size, cache(build), recipe.teacher.batch_size)


def _exported(folder: Path) -> Candidate:
    config, path = folder / export.CONFIG, folder / export.WEIGHTS
    try:
        values: dict[str, Any] = json.loads(config.read_text())
        spec = export.spec_of(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{config} is not the configuration of an exported student") from error
    if not path.is_file():
        raise DataError(f"export folder {str(folder)!r} has no {export.WEIGHTS}")

    def build() -> FrozenBackbone:
        student = build_student(spec)
        load_weights(student.timm_module, path)
        return _frozen(student, spec.height)

    size = (spec.height, spec.width)
    return Candidate("student", _digest(sha256_of(path), values, size), size, cache(build))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a safetensors file strictly, but for a mask token, which only training has a use for.

    Raises:
        DataError: when the file does not fit.
    """
    try:
        tensors = load_file(path)
        if "mask_token" not in network.state_dict():
            tensors.pop("mask_token", None)
        network.load_state_dict(tensors, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"{path} does not hold the weights of this student ({reason})") from None


def _frozen(student: Student, view_height: int) -> FrozenBackbone:
    student.to(_device())
    return FrozenStudent(student, view_height)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
