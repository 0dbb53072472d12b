"""Grid files: a base recipe, arms that change words of it, and repetitions of each arm.

A grid is read here and nowhere else; what comes out is one plain recipe for every run. All runs
share the shards and caches of the grid's own folder:

    <output>/<grid>/                shards  targets  teacher  synthetic  logs  table.md  table.json
    <output>/<grid>-<arm>-s<seed>/  an ordinary run folder for each run
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dpal.base.config import load_recipe, parse_yaml
from dpal.base.errors import ConfigError
from dpal.base.inputs import Views
from dpal.base.recipe import Recipe
from dpal.base.section import Paths, Section
from dpal.base.teachers import Teacher

NAME = r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$"
OWN_WORDS = ("name", "output", "repetitions")  # of the grid, when they stand on the command line
NOT_IN_GRIDS = ("name", "output", "train.seed")  # the grid sets these
DIAGNOSED = ("dpal", "mse")  # methods with the losses of `dpal diagnose`


class Arm(Section):
    """One row of the table: words that change the base recipe."""

    name: str = Field(pattern=NAME, description="part of the names of the arm's runs")
    label: str = Field("", description="how the table calls it; empty: its name")
    overrides: Paths = Field((), description="key=value words; they win over all others")
    untrained: bool = Field(False, description="only score the student's start values")
    diagnose: bool = Field(False, description="also run `dpal diagnose` on every repetition")

    @model_validator(mode="after")
    def _something_to_diagnose(self) -> "Arm":
        if self.untrained and self.diagnose:
            raise ValueError(
                f"arm {self.name!r}: diagnose has no effect with untrained; accepted is one of them"
            )
        return self


class Grid(Section):
    """A grid file."""

    name: str = Field(pattern=NAME, description="name of the grid's folder; starts its runs' names")
    base: str = Field(description="recipe that all arms start from, relative to the grid file")
    output: str = Field("", description="folder of all run folders; empty: the base recipe's")
    common: Paths = Field((), description="key=value words of every arm")
    repetitions: int = Field(1, ge=1, description="runs of each arm, with train.seed=0, 1, ...")
    arms: Annotated[tuple[Arm, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _words_fit(self) -> "Grid":
        names = [arm.name for arm in self.arms]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"arms: the name {name!r} stands twice; accepted are unique names")
        for word in (*self.common, *(word for arm in self.arms for word in arm.overrides)):
            key = word.partition("=")[0]
            if key in NOT_IN_GRIDS:
                raise ValueError(f"override {word!r}: a grid sets {key} by itself; leave it out")
        return self


@dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Attributes:
        arm: the row it belongs to.
        seed: number of the repetition, the recipe's `train.seed`.
        recipe: what is trained.
        command: the words that train it from the shared cache.
    """

    arm: Arm
    seed: int
    recipe: Recipe
    command: str


@dataclass(frozen=True)
class Plan:
    """A grid, resolved.

    Attributes:
        grid: as the file and the command line say.
        shared: for every arm, the recipe whose run folder is the grid's own: it describes what
            all repetitions share (shards, taught teacher, targets).
        runs: every run, repetition by repetition.
    """

    grid: Grid
    shared: tuple[Recipe, ...]
    runs: tuple[GridRun, ...]

    @property
    def folder(self) -> Path:
        """The grid's own folder."""
        return self.shared[0].run_dir


def load_plan(path: str | Path, words: tuple[str, ...] = ()) -> Plan:
    """Read a grid file and resolve every run of it.

    Words of the command line stand between the grid's `common` words and an arm's own, which win:
    an arm stays what its name says. `name`, `output` and `repetitions` are the grid's own.

    Raises:
        ConfigError: naming the arm, when a run of it is not a valid recipe.
    """
    path, own, common = Path(path), {}, []
    for word in words:
        key, separator, raw = word.partition("=")
        if separator and key in OWN_WORDS:
            own[key] = parse_yaml(raw, f"override {word!r}")
        elif key in NOT_IN_GRIDS:
            raise ConfigError(f"override {word!r}: a grid sets {key} by itself; leave it out")
        else:
            common.append(word)
    grid = _read(path, own)
    base = Path(os.path.normpath(path.parent / grid.base))
    if grid.output:
        common.append(f"output={grid.output}")
    shared, runs = [], []
    for arm in grid.arms:
        try:
            words_of_arm = (*grid.common, *common, *arm.overrides)
            together = load_recipe(base, (*words_of_arm, f"name={grid.name}"))
            _check_diagnosed(arm, together)
            runs += [_run(grid, arm, seed, base, words_of_arm, together) for seed in _seeds(grid)]
        except ConfigError as error:
            raise ConfigError(f"grid {grid.name!r}, arm {arm.name!r}: {error}") from None
        shared.append(together)
    _check_shared(shared)
    runs.sort(key=lambda run: run.seed)  # stable: a stopped grid has whole repetitions
    return Plan(grid, tuple(shared), tuple(runs))


def largest_views(plan: Plan) -> Views:
    """The views of the arm with the largest: every arm is scored on pixels of that size."""
    return max((recipe.views for recipe in plan.shared), key=lambda views: views.height)


def distinct_teachers(plan: Plan) -> tuple[Teacher, ...]:
    """Every teacher that an arm has, once."""
    found: dict[str, Teacher] = {}
    for recipe in plan.shared:
        for teacher in recipe.teachers:
            found.setdefault(teacher.model_dump_json(), teacher)
    return tuple(found.values())


def _read(path: Path, own: dict[str, Any]) -> Grid:
    try:
        values = parse_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"grid {str(path)!r} does not exist or is not a text file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"grid {str(path)!r} is empty or not a mapping")
    try:
        return Grid.model_validate({**values, **own})
    except ValidationError as error:
        raise ConfigError(f"grid {str(path)!r}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        fields = Arm.model_fields if key.startswith("arms.") else Grid.model_fields
        return f"unknown key {key!r}; accepted are {', '.join(fields)}"
    if first["type"] == "too_short":
        return f"{key} is empty; accepted are one and more"
    if first["type"] == "missing":
        return f"key {key!r} is required"
    shown = first["input"] if isinstance(first["input"], str | int | float | bool) else "..."
    return f"{key}={shown}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _seeds(grid: Grid) -> range:
    return range(grid.repetitions)


def _run(
    grid: Grid, arm: Arm, seed: int, base: Path, words: tuple[str, ...], together: Recipe
) -> GridRun:
    own = [f"name={grid.name}-{arm.name}-s{seed}", f"train.seed={seed}"]
    for key, value in (("data.shards", together.data.shards), ("cache.url", together.cache.url)):
        if not any(word.startswith(f"{key}=") for word in words):
            own.append(f"{key}={value}")
    command = shlex.join(("dpal", "train", str(base), *words, *own))
    return GridRun(arm, seed, load_recipe(base, (*words, *own)), command)


def _check_diagnosed(arm: Arm, recipe: Recipe) -> None:
    """Refused now, not after the arm was trained."""
    if arm.diagnose and recipe.method.kind not in DIAGNOSED:
        raise ConfigError(
            f"diagnose has no effect with method.kind={recipe.method.kind}; accepted are "
            f"{' and '.join(DIAGNOSED)}"
        )


def _check_shared(shared: list[Recipe]) -> None:
    """All arms lie in one folder, so they have the same images, and one taught teacher at most."""
    taught = {t.model_dump_json() for r in shared for t in r.teachers if t.kind == "taught"}
    if len(taught) > 1:
        raise ConfigError(
            "the arms name different teachers of kind=taught; accepted is one for a whole grid"
        )
    pixels = {
        (r.views.height, r.views.width, r.views.aspect)
        for r in shared
        if any(teacher.kind == "taught" for teacher in r.aligned_teachers)
    }
    if len(pixels) > 1:
        raise ConfigError(
            "views.height, views.width or views.aspect differs between arms, and a teacher of "
            "kind=taught is taught on one; accepted is one for a whole grid"
        )
    for key in ("output", "data", "seed", "storage", "evaluate"):
        if any(getattr(recipe, key) != getattr(shared[0], key) for recipe in shared):
            raise ConfigError(f"{key} differs between arms; accepted is one for a whole grid")
