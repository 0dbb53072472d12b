"""A run that was rendered by the loader goes on with the training device, bit for bit."""

import multiprocessing
import shutil
from pathlib import Path

from dpal import checkpoint
from dpal.base.config import resolve_recipe
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs import build_shards, train

from tiny import fill_cache, tiny_values

STEPS = 4


def run(recipe: Recipe) -> None:
    """Train in a process of its own, as DeepSpeed cannot be started twice in one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.train", "dpal.model.timm_import"])
    process = context.Process(target=train.run, args=(recipe,))
    process.start()
    process.join(300)
    assert process.exitcode == 0


def rendered_by(recipe: Recipe, who: str) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"render": who})})


def test_a_run_changes_its_renderer_between_two_starts_and_stays_the_same_run(
    tmp_path: Path,
) -> None:
    values = tiny_values(tmp_path, duration=f"{STEPS} steps", checkpoint_every=2)
    recipe = resolve_recipe(values)
    build_shards.run(recipe)
    fill_cache(recipe)
    run(rendered_by(recipe, "loader"))
    folder = RunLayout(recipe.run_dir).checkpoints
    undisturbed = checkpoint.latest(folder)
    assert undisturbed is not None
    assert undisturbed.step == STEPS

    shutil.rmtree(folder / f"step-{STEPS:08d}")  # as if it had died after step 2
    run(rendered_by(recipe, "device"))
    found = checkpoint.latest(folder)
    assert found is not None
    assert dict(found.files) == dict(undisturbed.files), "every file, bit for bit"
