"""What the processes of `dpal ablate` do: prepare what runs share, or do one run.

    python -m jobs.grids.worker prepare GRID [key=value ...]
    python -m jobs.grids.worker run NUMBER GRID [key=value ...]

Each answers with the exit codes of the `dpal` command.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpal.base.errors import EXIT_DONE, DpalError, StorageError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.grids.grid import GridRun, Plan, distinct_teachers, largest_views, load_plan
from jobs.grids.results import TEACHERS, grid_identity, result_identity
from jobs.publish import write_text
from jobs.saved_recipe import save_recipe


def main(argv: Sequence[str]) -> int:
    """Do one piece of a grid's work and return the exit code."""
    try:
        if argv[0] == "prepare":
            prepare(load_plan(argv[1], tuple(argv[2:])))
        else:
            plan = load_plan(argv[2], tuple(argv[3:]))
            do_run(plan, plan.runs[int(argv[1])])
        return EXIT_DONE
    except (DpalError, OSError) as error:
        known = StorageError.of(error) if isinstance(error, OSError) else error
        if known is None:
            raise
        print(f"dpal ablate: {known}", file=sys.stderr)
        return known.exit_code


def prepare(plan: Plan) -> None:
    """Shards, taught teacher and targets of every arm, once each; then score the teachers.

    Raises:
        StopRequested: asked to stop; what is done stays.
        ConfigError, DataError, StorageError: what a user can mend.
    """
    from jobs import build_shards, cache_features, teach

    print("── shard", flush=True)
    print(build_shards.run(plan.shared[0]).detail, flush=True)
    taught = [r for r in plan.shared if any(t.kind == "taught" for t in r.teachers)]
    if taught:  # also beside SAIP alone: the teacher's scores are a row
        print("── teach", flush=True)
        recipe = next((r for r in taught if r.aligned_teachers), taught[0])
        print(teach.run(recipe).detail, flush=True)
    done: list[tuple[Any, ...]] = []
    for recipe in plan.shared:
        what = (recipe.teachers, recipe.views, recipe.cache, _stride(recipe), recipe.loss.targets)
        cached = recipe.train.targets == "cached" and recipe.aligned_teachers
        if cached and what not in done:
            done.append(what)
            print("── cache", flush=True)
            print(cache_features.run(recipe).detail, flush=True)
    print("── teachers", flush=True)
    rows = _score_teachers(plan)
    _write(plan.folder / TEACHERS, {"identity": grid_identity(plan), "rows": rows})


def do_run(plan: Plan, run: GridRun) -> None:
    """Train, score and diagnose one run; its `result.json` is written last.

    Raises:
        StopRequested: asked to stop, with a committed checkpoint.
        ConfigError, DataError, StorageError: what a user can mend.
    """
    from jobs import train
    from jobs.backbones import trained_student, untrained_student
    from jobs.diagnose import diagnose
    from jobs.evaluate import score_candidates

    recipe, layout = run.recipe, RunLayout(run.recipe.run_dir)
    save_recipe(recipe)
    _link_shared(plan.folder, layout.root)
    # Every arm is scored on views of one size, whatever size it was trained on.
    seen = recipe.model_copy(update={"views": largest_views(plan)})
    if run.arm.untrained:
        candidate = untrained_student(seen)
    else:
        print(f"train: {train.run(recipe).detail}", flush=True)
        candidate = trained_student(seen)
    candidate = candidate._replace(kept_pictures=_decoded(plan))
    rows, _ = score_candidates([candidate], recipe.evaluate, layout)
    if run.arm.diagnose:
        diagnose(layout.root)
    scores = [{"task": r.task, "data": r.data, "metrics": r.metrics} for r in rows]
    _write(layout.grid_result, {"identity": result_identity(plan, run), "rows": scores})


def _score_teachers(plan: Plan) -> list[dict[str, Any]]:
    """Every distinct teacher of the grid, each once."""
    from jobs.backbones import teachers_of
    from jobs.evaluate import score_candidates

    teachers = distinct_teachers(plan)
    if not teachers:
        return []
    taught_by = {"teacher": teachers[0], "more_teachers": teachers[1:]}
    together = plan.shared[0].model_copy(update={**taught_by, "views": largest_views(plan)})
    candidates = [c._replace(kept_pictures=_decoded(plan)) for c in teachers_of(together)]
    found, _ = score_candidates(candidates, together.evaluate, RunLayout(plan.folder))
    return [
        {"model": row.model, "task": row.task, "data": row.data, "metrics": row.metrics}
        for row in found
    ]


def _stride(recipe: Recipe) -> int:
    return recipe.views.height // recipe.student.height


def _decoded(plan: Plan) -> Path:
    """Where the evaluation keeps decoded images for the next run."""
    return plan.folder / "decoded"


def _link_shared(shared: Path, folder: Path) -> None:
    """Let a run folder see the drawn persons and the taught teacher of the grid's folder."""
    for name in ("synthetic", "teacher"):
        if (shared / name).is_dir() and not (folder / name).exists():
            (folder / name).unlink(missing_ok=True)  # a link to a folder that was moved
            (folder / name).symlink_to(os.path.relpath(shared / name, folder))


def _write(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
