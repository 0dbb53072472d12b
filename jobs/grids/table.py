"""The table of a grid: `table.md` for a person, `table.json` for a program, text for a terminal."""

import json
from collections.abc import Sequence

from jobs.grids.grid import Plan
from jobs.grids.results import DIAGNOSTICS, ArmResult, Measure
from jobs.publish import write_text

CLASS = "IoU "  # metrics of single classes go into a table of their own


def write_table(plan: Plan, rows: Sequence[ArmResult]) -> None:
    """Write `table.md` and `table.json` into the grid's folder."""
    write_text(plan.folder / "table.md", markdown(plan, rows))
    write_text(plan.folder / "table.json", as_json(plan, rows))


def markdown(plan: Plan, rows: Sequence[ArmResult]) -> str:
    """One row an arm: every metric as mean ± sample standard deviation, cost, and command."""
    total = plan.grid.repetitions
    parts = [
        f"# {plan.grid.name}",
        "Frozen features, per cent; mean ± sample standard deviation over repetitions (`n`), which "
        "differ in start values, order and crops and share the teacher's targets. Seconds and "
        "images/s are of training alone.",
    ]
    for place in _places(rows):
        names = [name for name in _names(rows, place) if not name.startswith(CLASS)]
        parts.append(
            f"## {place}\n\n{_grid(_cells(rows, place, names, cost=place != DIAGNOSTICS))}"
        )
    for place in _places(rows):
        names = [name for name in _names(rows, place) if name.startswith(CLASS)]
        if names:
            parts.append(f"## {place}, by class\n\n{_grid(_cells(rows, place, names))}")
    commands = [f"- {row.label}: `{row.command}`" for row in rows if row.command]
    if commands:
        parts.append("## Commands\n\nOne repetition of each arm:\n\n" + "\n".join(commands))
    missing = [
        arm.name
        for arm in plan.grid.arms
        if sum(row.count for row in rows if row.name == arm.name and row.label) < total
    ]
    if missing:
        parts.append(f"Not finished: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def as_json(plan: Plan, rows: Sequence[ArmResult]) -> str:
    """The same numbers unrounded."""
    record = {
        "grid": plan.grid.name,
        "repetitions": plan.grid.repetitions,
        "rows": [
            {
                **row._asdict(),
                "metrics": {
                    place: {name: measure._asdict() for name, measure in found.items()}
                    for place, found in row.metrics.items()
                },
                "seconds": row.seconds and row.seconds._asdict(),
                "images_per_s": row.images_per_s and row.images_per_s._asdict(),
            }
            for row in rows
        ],
    }
    return json.dumps(record, indent=1) + "\n"


def console(plan: Plan, rows: Sequence[ArmResult]) -> str:
    """The tables without the single classes, in columns."""
    blocks = []
    for place in _places(rows):
        names = [name for name in _names(rows, place) if not name.startswith(CLASS)]
        cells = _cells(rows, place, names, cost=place != DIAGNOSTICS)
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        blocks.append("\n".join([f"── {plan.grid.name}: {place}", *lines]))
    return "\n\n".join(blocks)


def _places(rows: Sequence[ArmResult]) -> list[str]:
    return list(dict.fromkeys(place for row in rows for place in row.metrics))


def _names(rows: Sequence[ArmResult], place: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics.get(place, {})))


def _cells(
    rows: Sequence[ArmResult], place: str, names: Sequence[str], *, cost: bool = False
) -> list[list[str]]:
    """Head and body of a table of the rows that have something to say."""
    costs = ["seconds", "images/s"] if cost else []
    lines = [["arm", "n", *names, *costs]]
    digits = 3 if place == DIAGNOSTICS else 1
    for row in rows:
        found = row.metrics.get(place)
        if found:
            cells = [_shown(found.get(name), digits) for name in names]
            if cost:
                cells += [_shown(row.seconds, 0), _shown(row.images_per_s, 1)]
            lines.append([row.label, str(row.count), *cells])
    return lines


def _shown(measure: Measure | None, digits: int) -> str:
    if measure is None:
        return "-"
    if measure.spread is None:
        return f"{measure.mean:.{digits}f}"
    return f"{measure.mean:.{digits}f} ± {measure.spread:.{digits}f}"


def _grid(cells: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in cells)
    return "\n".join([head, "|" + "---|" * len(cells[0]), *body])
