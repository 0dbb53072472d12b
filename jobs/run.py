"""`dpal run`: every stage in its order, each of which skips what is done."""

import time
from collections.abc import Callable, Iterator
from importlib import import_module

from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.saved_recipe import save_recipe
from jobs.stage import StageResult

# Imported one by one, so that a stage that skips costs no import of torch or Ray by the others.
STAGES = (
    ("shard", "jobs.build_shards"),
    ("teach", "jobs.teach"),
    ("cache", "jobs.cache_features"),
    ("train", "jobs.train"),
    ("evaluate", "jobs.evaluate"),
    ("export", "jobs.export"),
    ("report", "jobs.report"),
)


def run(recipe: Recipe) -> list[StageResult]:
    """Run every stage the recipe needs; print one line for each. Raises what a stage raises."""
    save_recipe(recipe)
    results = []
    for name, stage in _needed(recipe):
        print(f"── {name}", flush=True)
        begin = time.monotonic()
        result = stage(recipe)
        done = "skipped" if result.skipped else f"done in {time.monotonic() - begin:.1f} s"
        print(f"{name}: {done}: {result.detail}", flush=True)
        results.append(result)
    print(f"\nreport: {RunLayout(recipe.run_dir).report}", flush=True)
    return results


def _needed(recipe: Recipe) -> Iterator[tuple[str, Callable[[Recipe], StageResult]]]:
    unneeded = set()
    if all(teacher.kind != "taught" for teacher in recipe.teachers):
        unneeded.add("teach")
    if recipe.train.targets == "online" or not recipe.aligned_teachers:
        unneeded.add("cache")
    if not recipe.evaluate:
        unneeded.add("evaluate")
    for name, module in STAGES:
        if name not in unneeded:
            yield name, import_module(module).run
