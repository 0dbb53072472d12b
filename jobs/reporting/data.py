"""What a report shows, read from a run folder: events, scores, export, pictures.

Whatever is absent is None or empty; whatever is half written (a run that was killed) is skipped.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.previews.index import Preview, read_previews

PATTERNS = ("identity", "shape", "relation")
ROUTING_ROWS = 10  # logged steps that the router table is the mean of


class Step(NamedTuple):
    """One logged step; a value the trainer did not write is NaN.

    Attributes:
        terms: every other number that the method logged, by name: loss terms and diagnostics.
        lists: every list of numbers that it logged, by name.
    """

    step: int
    time: float
    loss: float
    lr: float
    data_s: float
    step_s: float
    images_per_s: float
    terms: Mapping[str, float]
    lists: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class History:
    """The training run as its log tells it.

    Attributes:
        steps: ascending, one row a step; of a repeated step the last row counts.
        checkpoint_seconds: time each commit took.
        num_student, num_decoder: parameters; 0 when unknown.
        world_sizes: of every start, in order; more than one entry means the run was resumed.
        routing: mean router probability [called pattern][pattern] of the last logged steps; may be
            empty.
        finished: the last run ended with "done".
    """

    steps: tuple[Step, ...] = ()
    checkpoint_seconds: tuple[float, ...] = ()
    num_student: int = 0
    num_decoder: int = 0
    world_sizes: tuple[int, ...] = ()
    routing: tuple[tuple[float, ...], ...] = ()
    finished: bool = False


class Score(NamedTuple):
    """One metric of one task, in percent, for each model that was scored.

    Of several teachers, `teacher` is the best in this metric.
    """

    task: str
    data: str
    metric: str
    untrained: float | None
    student: float | None
    teacher: float | None

    @property
    def is_detail(self) -> bool:
        """True for the score of a single class."""
        return self.metric.startswith("IoU ")

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from untrained to teacher that the student covers, in percent."""
        if self.untrained is None or self.student is None or self.teacher is None:
            return None
        if self.teacher - self.untrained <= 0:
            return None
        return 100 * (self.student - self.untrained) / (self.teacher - self.untrained)


class Export(NamedTuple):
    """The exported folder: where it is and how far it is from the trained student."""

    folder: str
    step: int
    max_abs_error: float
    num_bytes: int
    onnx: bool


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report shows; `digest` covers all of it."""

    recipe: Recipe
    history: History
    scores: tuple[Score, ...]
    previews: tuple[Preview, ...]
    preview_problem: str
    export: Export | None
    digest: str


def gather(recipe: Recipe, preview_problem: str = "", version: str = "") -> ReportInputs:
    """Read the run folder of `recipe`; `preview_problem` says why pictures are missing, if so."""
    layout = RunLayout(recipe.run_dir)
    previews = read_previews(layout.previews)
    files = [layout.events, layout.evaluation, layout.export / "parity.json"]
    files += [layout.previews / "index.json", layout.export / "onnx.json"]
    files += [preview.file for preview in previews.previews] if previews else []
    hashed = hashlib.sha256(f"{version}\n{preview_problem}\n{recipe.to_yaml()}".encode())
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        hashed.update(hashlib.sha256(content).digest())
    return ReportInputs(
        recipe=recipe,
        history=read_history(layout.events),
        scores=read_scores(layout.evaluation),
        previews=previews.previews if previews else (),
        preview_problem=preview_problem,
        export=_read_export(layout.export),
        digest=hashed.hexdigest()[:16],
    )


def read_history(path: Path) -> History:
    """Read `events.jsonl`, also of a run that was killed and resumed."""
    steps: dict[int, Step] = {}
    routing: dict[int, list[list[float]]] = {}
    seconds: list[float] = []
    worlds: list[int] = []
    parameters: dict[str, int] = {}
    finished = False
    for row in _rows(path):
        event = row.get("event")
        if event == "step":
            steps[int(row["step"])] = _step(row)
            routing[int(row["step"])] = row.get("routing") or []
        elif event == "checkpoint" and "seconds" in row:
            seconds.append(float(row["seconds"]))
        elif event == "start":
            worlds.append(int(row.get("world_size", 1)))
            parameters = row.get("num_parameters") or parameters
        finished = event == "done"
    return History(
        steps=tuple(steps[number] for number in sorted(steps)),
        checkpoint_seconds=tuple(seconds),
        num_student=int(parameters.get("student", 0)),
        num_decoder=int(parameters.get("decoder", 0)),
        world_sizes=tuple(worlds),
        routing=_mean_table([routing[number] for number in sorted(routing)[-ROUTING_ROWS:]]),
        finished=finished,
    )


def read_scores(path: Path) -> tuple[Score, ...]:
    """Read `evaluation.json`, one row a task and metric, in the order of the file."""
    table: dict[tuple[str, str, str], dict[str, float]] = {}
    for entry in _json(path, []):
        for metric, value in entry.get("metrics", {}).items():
            key = (entry.get("task", ""), entry.get("data", ""), metric)
            table.setdefault(key, {})[entry.get("model", "")] = float(value)
    return tuple(_score(key, models) for key, models in table.items())


def _score(key: tuple[str, str, str], models: dict[str, float]) -> Score:
    teachers = [value for name, value in models.items() if name.startswith("teacher")]
    best = max(teachers, default=None)
    return Score(*key, models.get("untrained"), models.get("student"), best)


def _mean_table(tables: list[list[list[float]]]) -> tuple[tuple[float, ...], ...]:
    tables = [table for table in tables if table]
    if not tables:
        return ()
    rows = zip(*tables, strict=True)
    return tuple(tuple(sum(cell) / len(tables) for cell in zip(*row, strict=True)) for row in rows)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut short by a kill; the step is written again after the resume
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _step(row: dict[str, Any]) -> Step:
    fixed = Step._fields[1:-2]
    plain = [float(row[name]) if _is_number(row.get(name)) else math.nan for name in fixed]
    others = {name: value for name, value in row.items() if name not in ("step", *fixed)}
    return Step(
        int(row["step"]),
        *plain,
        terms={name: float(value) for name, value in others.items() if _is_number(value)},
        lists={
            name: tuple(map(float, value))
            for name, value in others.items()
            if isinstance(value, list) and all(map(_is_number, value))
        },
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _read_export(folder: Path) -> Export | None:
    parity = _json(folder / "parity.json", None)
    weights = folder / "model.safetensors"
    if not isinstance(parity, dict) or not weights.is_file():
        return None
    return Export(
        folder=str(folder),
        step=int(parity.get("step", 0)),
        max_abs_error=float(parity.get("max_abs_error", math.nan)),
        num_bytes=weights.stat().st_size,
        onnx=(folder / "model.onnx").is_file(),
    )


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return default
