"""Which shards a run learns from: all, or those that were finished when it first started.

A cache that is being built grows while a run learns from it. A run whose shards grew with it would
see another sequence after every restart, so they are written down once, in `shards.json` of the
run folder, and stay what they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import finished_part, open_cache
from data_tools.manifest import Manifest, manifest_of
from data_tools.storage import LocalStore
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.caching.plan import definition_of, single_teacher_recipes


def learned_manifest(recipe: Recipe) -> Manifest:
    """The shards that training reads, in the order of the data set's manifest.

    With `train.partial` the first process of the first start writes them down.

    Raises:
        DataError: too little is finished for a single step, or the run learns from other images.
    """
    whole = manifest_of(recipe)
    if not recipe.train.partial:
        return whole
    path = RunLayout(recipe.run_dir).shards
    if not path.exists():
        names = [ref.name for ref in _finished(recipe, whole).shards]
        text = json.dumps({"data": whole.digest, "shards": names}, indent=1) + "\n"
        LocalStore(path.parent).put_if_absent(path.name, text.encode())  # ranks agree on the first
    return _part(whole, path)


def learned_line(recipe: Recipe, learned: Manifest) -> str:
    """A line about what a run with `train.partial` learns from; empty for other runs."""
    if not recipe.train.partial:
        return ""
    return (
        f"partial: learning from {len(learned.shards)} shards, {learned.num_samples} samples, that "
        f"were finished at the first start ({RunLayout(recipe.run_dir).shards})"
    )


def _finished(recipe: Recipe, whole: Manifest) -> Manifest:
    """The shards that every teacher has seen."""
    pool = load_backgrounds(recipe)
    singles = single_teacher_recipes(recipe)
    caches = [open_cache(one, definition_of(one, whole, pool)) for one in singles]
    part = finished_part(whole, caches)
    if part.num_samples < recipe.train.global_batch:
        raise DataError(
            f"train.partial: {len(part.shards)} of {len(whole.shards)} shards with "
            f"{part.num_samples} samples are finished, less than train.global_batch="
            f"{recipe.train.global_batch}; let `dpal cache` go on first"
        )
    return part


def _part(whole: Manifest, path: Path) -> Manifest:
    """The shards that `path` lists."""
    try:
        plain = json.loads(path.read_text())
        data, names = plain["data"], plain["shards"]
        listed = frozenset(names) if isinstance(names, Sequence) else frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        data, listed = "", frozenset()
    shards = tuple(ref for ref in whole.shards if ref.name in listed)
    if data != whole.digest or not shards or len(shards) != len(listed):
        raise DataError(
            f"{str(path)!r} is damaged, or was written for other images than {whole.digest}; "
            "choose another name, or remove the run folder"
        )
    return Manifest(shards, whole.rejected)
