"""`dpal diagnose`: gradient cosines, expert similarity and router entropy of a trained run."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.backgrounds import load_backgrounds
from dpal import checkpoint
from dpal.base.config import load_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.diagnose import gradient_cosines
from dpal.method.build import build_task
from dpal.ranks import World
from dpal.task import Moment
from dpal.trainer import Schedule
from jobs.grids.grid import DIAGNOSED
from jobs.grids.results import read_diagnosis
from jobs.learned import learned_manifest
from jobs.publish import write_text
from jobs.train import make_loader, target_sources

BATCHES = 4


def diagnose(folder: Path, num_batches: int = BATCHES) -> dict[str, Any]:
    """Diagnose the last checkpoint of a run on the first batches of its order.

    The result is written to `diagnosis.json` in the run folder; one of the same checkpoint and
    number of batches is read instead of being computed again.

    Raises:
        DataError: no run, or no committed checkpoint.
        ConfigError: a method without the three losses.
    """
    layout = RunLayout(folder)
    recipe = _diagnosable(layout)
    found = checkpoint.latest(layout.checkpoints) if recipe is not None else None
    if recipe is None or found is None:
        raise DataError(f"{str(folder)!r} is not a run folder with a committed checkpoint")
    origin = {"step": found.step, "checkpoint": found.digest, "batches": num_batches}
    before = read_diagnosis(folder)
    if before is not None and {key: before.get(key) for key in origin} == origin:
        return before
    # Dropping would compare gradients of different teachers.
    everyone = recipe.loss.model_copy(update={"teacher_drop": 0.0})
    recipe = recipe.model_copy(update={"loss": everyone})
    manifest = learned_manifest(recipe)
    pool = load_backgrounds(recipe)
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, layout.teacher)
    task.load_state_dict(checkpoint.load(found).parameters, strict=True)
    moment = Moment(
        found.step,
        Schedule.of(recipe, manifest.num_samples).total,
        manifest.num_samples,
        recipe.train.global_batch,
    )
    loader = make_loader(recipe, manifest, pool, task, caches, World(0, 1, 0))
    batches = loader.batches(0)
    try:
        result = gradient_cosines(task, islice(batches, num_batches), moment)
    finally:
        batches.close()  # type: ignore[attr-defined]
    record = {**origin, **result._asdict()}
    write_text(layout.diagnosis, json.dumps(record, indent=1) + "\n")
    return record


def _diagnosable(layout: RunLayout) -> Recipe | None:
    """The recipe of a run folder; None for another folder. Raises ConfigError."""
    if not layout.recipe.is_file():
        return None
    recipe = load_recipe(layout.recipe)
    if recipe.method.kind not in DIAGNOSED:
        raise ConfigError(
            f"method.kind={recipe.method.kind} has no loss of identity, shape or relation to "
            f"diagnose; accepted are {' and '.join(DIAGNOSED)}"
        )
    return recipe


def text(record: dict[str, Any]) -> str:
    """A diagnosis as a table: one line a block, one column a pair of losses."""
    pairs, lines = list(record["cosines"]), []
    lines.append(
        f"step {record['step']}, {record['num_images']} images in "
        f"{record['num_batches']} batches, float32"
    )
    if pairs:
        lines.append(f"{'cosine of gradients':<24}" + "".join(f"{pair:>20}" for pair in pairs))
        blocks = dict.fromkeys(b for pair in pairs for b in record["cosines"][pair])
        for block in blocks:
            cells = [record["cosines"][pair].get(block) for pair in pairs]
            shown = ("-" if cell is None else f"{cell:+.3f}" for cell in cells)
            lines.append(f"  {block:<22}" + "".join(f"{cell:>20}" for cell in shown))
    for loss, norm in record["norms"].items():
        lines.append(f"gradient norm of {loss:<12} {norm:.3e}")
    for name in ("router_entropy", "expert_similarity"):
        if record[name] is not None:
            lines.append(f"{name.replace('_', ' '):<24} {record[name]:.4f}")
    return "\n".join(lines)
