"""The rows of `evaluation.json`: who was scored on what, and the table a person reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.publish import write_text

HEADLINE = {"reid": "mAP", "parsing": "mIoU"}


class Row(NamedTuple):
    """One model scored on one data set.

    Attributes:
        task: `reid` or `parsing`.
        model: `student`, `untrained`, `teacher`, or `teacher <name>` of several.
        data: the folder as the recipe names it.
        metrics: scores in percent, by name.
        model_id: digest of the weights and of how they are read.
        data_id: digest of the labels, the view size and the protocol.
    """

    task: str
    model: str
    data: str
    metrics: dict[str, float]
    model_id: str
    data_id: str


class Scores:
    """All rows of one file; a file that cannot be read counts as empty and is replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        try:
            entries = json.loads(path.read_text())
            self.rows = [Row(**{name: entry[name] for name in Row._fields}) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError):
            self.rows = []

    def find(self, task: str, model: str, data: str, model_id: str, data_id: str) -> Row | None:
        """The row of exactly this model and data, if it was computed before."""
        for row in self.rows:
            if row._replace(metrics={}) == (task, model, data, {}, model_id, data_id):
                return row
        return None

    def put(self, row: Row) -> None:
        """Store `row` and drop what it makes stale: its place, and older weights of its model."""
        place = [(old.task, old.model, old.data) == row[:3] for old in self.rows]
        stale = [old.model == row.model and old.model_id != row.model_id for old in self.rows]
        if any(place):
            self.rows[place.index(True)] = row
            stale[place.index(True)] = False
        else:
            self.rows.append(row)
            stale.append(False)
        self.rows = [kept for kept, old in zip(self.rows, stale, strict=True) if not old]
        rows = [kept._asdict() for kept in self.rows]
        write_text(self.path, json.dumps(rows, indent=1) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Scores as text: one block a data set, one line a metric, one column a model."""
    lines = []
    for (task, data), group in _by_data(rows).items():
        title = f"{task}, {data} (%)"
        widths = [max(11, len(row.model) + 2) for row in group]
        heads = (f"{row.model:>{width}}" for row, width in zip(group, widths, strict=True))
        lines.append(f"{title:<40}" + "".join(heads))
        for name in dict.fromkeys(name for row in group for name in row.metrics):
            cells = (f"{row.metrics[name]:.1f}" if name in row.metrics else "-" for row in group)
            aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"  {name:<38}" + "".join(aligned))
    return "\n".join(lines)


def headlines(rows: Sequence[Row]) -> str:
    """One line: the first metric of every task, model beside model."""
    return "; ".join(
        f"{task} {HEADLINE[task]} "
        + ", ".join(f"{row.model} {row.metrics[HEADLINE[task]]:.1f}" for row in group)
        for (task, _), group in _by_data(rows).items()
    )


def _by_data(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.data), []).append(row)
    return groups
