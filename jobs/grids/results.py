"""What the runs of a grid came to: read from their folders, gathered by arm.

A run's `result.json` is written last and names what it is the result of; one that names anything
else (another recipe, other labels) does not count.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.labelled import labels_digest
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.grids.grid import Arm, GridRun, Plan, largest_views
from jobs.publish import read_record

TEACHERS = "teachers.json"  # in the grid's folder
DIAGNOSTICS = "diagnostics"


class Measure(NamedTuple):
    """A number over repetitions.

    Attributes:
        mean: over those that have it.
        spread: sample standard deviation; None for one repetition alone.
        count: number of repetitions.
    """

    mean: float
    spread: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> "Measure":
        """Summarise at least one value."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Measure(statistics.fmean(values), spread, len(values))


class ArmResult(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the arm, or of the teacher.
        label: how the table calls it.
        count: finished repetitions.
        metrics: scores in per cent by name, for every evaluation ("reid, folder"), and what
            `dpal diagnose` found under `diagnostics`.
        seconds: of training, without start-up and evaluation; None where nothing was trained.
        images_per_s: of training.
        command: trains the first repetition; empty for a teacher.
    """

    name: str
    label: str
    count: int
    metrics: Mapping[str, Mapping[str, Measure]]
    seconds: Measure | None
    images_per_s: Measure | None
    command: str


def result_identity(plan: Plan, run: GridRun) -> str:
    """What decides a run's result, as 16 hex digits."""
    arm = (run.arm.untrained, run.arm.diagnose)
    return _digest(run.recipe, run.recipe.digest(), arm, largest_views(plan).model_dump())


def grid_identity(plan: Plan) -> str:
    """What decides the targets and the teachers' scores, as 16 hex digits."""
    targets = {
        (
            *(teacher.model_dump_json() for teacher in r.teachers),
            *(s.model_dump_json() for s in (r.views, r.cache, r.student, r.data)),
            *(r.loss.targets, r.train.targets, r.seed),
        )
        for r in plan.shared
    }
    return _digest(plan.shared[0], sorted(map(repr, targets)), largest_views(plan).model_dump())


def finished(plan: Plan, run: GridRun) -> bool:
    """Whether a run has a result."""
    record = read_record(RunLayout(run.recipe.run_dir).grid_result)
    # Without a record nothing else is read: a dry run needs no labels.
    return bool(record) and record.get("identity") == result_identity(plan, run)


def prepared(plan: Plan) -> bool:
    """Whether shards, targets and the teachers' scores are there."""
    record = read_record(plan.folder / TEACHERS)
    return bool(record) and record.get("identity") == grid_identity(plan)


def gather(plan: Plan) -> list[ArmResult]:
    """A row for every teacher and for every arm with a finished run."""
    return [*_teachers(plan), *(row for arm in plan.grid.arms if (row := _arm(plan, arm)))]


def _teachers(plan: Plan) -> list[ArmResult]:
    rows = read_record(plan.folder / TEACHERS).get("rows", []) if prepared(plan) else []
    found: dict[str, dict[str, dict[str, Measure]]] = {}
    for row in rows:
        scores = {name: Measure.of([value]) for name, value in row["metrics"].items()}
        found.setdefault(row["model"], {})[f"{row['task']}, {row['data']}"] = scores
    return [ArmResult(name, name, 1, scores, None, None, "") for name, scores in found.items()]


def _arm(plan: Plan, arm: Arm) -> ArmResult | None:
    runs = [run for run in plan.runs if run.arm is arm and finished(plan, run)]
    if not runs:
        return None
    scores: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for row in read_record(RunLayout(run.recipe.run_dir).grid_result)["rows"]:
            for name, value in row["metrics"].items():
                place = scores.setdefault(row["task"] + ", " + row["data"], {})
                place.setdefault(name, []).append(value)
    metrics = {
        place: {name: Measure.of(values) for name, values in found.items()}
        for place, found in scores.items()
    }
    told = [d for run in runs if arm.diagnose and (d := read_diagnosis(run.recipe.run_dir))]
    if told:
        found = [diagnosis_numbers(record) for record in told]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        metrics[DIAGNOSTICS] = {
            name: Measure.of([numbers[name] for numbers in found if name in numbers])
            for name in names
        }
    trained = [] if arm.untrained else [training_cost(run.recipe) for run in runs]
    seconds, rate = (
        Measure.of([cost[column] for cost in trained]) if trained else None for column in (0, 1)
    )
    label, command = arm.label or arm.name, "" if arm.untrained else runs[0].command
    return ArmResult(arm.name, label, len(runs), metrics, seconds, rate, command)


def read_diagnosis(folder: Path) -> dict[str, Any] | None:
    """What `dpal diagnose` wrote into a run folder; None when there is nothing that can be read."""
    record = read_record(RunLayout(folder).diagnosis)
    return record if {"cosines", "router_entropy", "expert_similarity"} <= record.keys() else None


def diagnosis_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of a diagnosis that a table has room for; what is absent is left out."""
    values = {f"cos {pair}": blocks.get("student") for pair, blocks in record["cosines"].items()}
    values["router entropy"] = record["router_entropy"]
    values["expert similarity"] = record["expert_similarity"]
    return {name: value for name, value in values.items() if value is not None}


def training_cost(recipe: Recipe) -> tuple[float, float]:
    """Seconds of training and images per second, from the logged steps of a finished run.

    Each logged step stands for those since the one before, so pauses and restarts do not count.
    """
    seconds: dict[int, float] = {}
    for line in RunLayout(recipe.run_dir).events.read_text().splitlines():
        row = json.loads(line)
        if row["event"] == "step":
            seconds[row["step"]] = row["data_s"] + row["step_s"]
    mean = statistics.fmean(seconds.values())
    return mean * max(seconds), recipe.train.global_batch / mean


def _digest(recipe: Recipe, *parts: object) -> str:
    """Digest of `parts` and of the labels that the recipe is evaluated on."""
    labels = [
        labels_digest(Path(wanted.data)) for wanted in recipe.evaluate if wanted.data != "synthetic"
    ]
    return hashlib.sha256(repr((parts, labels)).encode()).hexdigest()[:16]
