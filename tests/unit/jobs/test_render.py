"""`train.render` changes who resizes, and nothing else: same pixels, same losses, same science."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.manifest import Manifest, load_manifest
from data_tools.storage import open_store
from dpal.alignment import AlignmentTask
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe
from dpal.batch import RawBatch, TrainBatch
from dpal.device_render import DeviceRenderer
from dpal.method.build import build_task
from dpal.ranks import World
from dpal.task import Losses, Moment
from dpal.views.plan import ViewPlan
from jobs import build_shards
from jobs.train import make_loader, target_sources

from tiny import fill_cache, tiny_recipe, tiny_values
from tiny_scenes import ARMS, arm_recipe


def with_train(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def world_of(recipe: Recipe) -> tuple[Manifest, BackgroundPool]:
    return load_manifest(open_store(recipe.data.shards, recipe.storage)), load_backgrounds(recipe)


def looked_at(recipe: Recipe, count: int) -> Iterator[tuple[Any, Losses]]:
    """The first batches of a run and their losses, without an engine."""
    manifest, pool = world_of(recipe)
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, Path("no taught teacher"))
    batches = make_loader(recipe, manifest, pool, task, caches, World(0, 1, 0)).batches(0)
    for step, batch in enumerate(islice(batches, count)):
        moment = Moment(step, 6, manifest.num_samples, recipe.train.global_batch)
        with torch.no_grad():
            losses = task(batch, moment)
        yield batch, losses  # outside: two such generators in turns would restore each other's mode
    batches.close()


def both(recipe: Recipe, count: int = 2) -> list[tuple[TrainBatch, TrainBatch, Losses, Losses]]:
    """Batches rendered by the loader and by the device, and the losses of both."""
    renderer = DeviceRenderer(ViewPlan(recipe.seed, recipe.views))
    pairs = []
    for loader, device in zip(
        looked_at(with_train(recipe, render="loader"), count),
        looked_at(with_train(recipe, render="device"), count),
        strict=True,
    ):
        assert isinstance(device[0], RawBatch)
        rendered = renderer(device[0], torch.device("cpu"))
        pairs.append((loader[0], rendered, loader[1], device[1]))
    return pairs


def check_same(recipe: Recipe, count: int = 2) -> None:
    for loader, device, losses, losses_of_device in both(recipe, count):
        assert loader.keys == device.keys
        for name in ("base", "crops", "composite", "photometric", "regions"):
            a, b = np.asarray(getattr(loader, name)), np.asarray(getattr(device, name))
            assert a.shape == b.shape, name
            assert np.array_equal(a, b), name
        for mine, theirs in zip(loader.records, device.records, strict=True):
            assert np.array_equal(mine.base, theirs.base)
            assert np.array_equal(mine.composite, theirs.composite)
        assert torch.equal(losses.terms, losses_of_device.terms)
        assert torch.isfinite(losses.terms).all()


def test_cached_targets_give_the_same_pixels_and_losses(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    fill_cache(recipe)
    check_same(recipe)


def test_online_targets_give_the_same_pixels_and_losses(tmp_path: Path) -> None:
    check_same(tiny_recipe(tmp_path, targets="online"), count=1)


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_composite_gives_the_same_pixels_and_losses(tmp_path: Path, arm: str) -> None:
    check_same(with_train(arm_recipe(tmp_path, arm), targets="online"), count=1)


def test_a_method_without_crops_and_composites_gives_the_same_losses(tmp_path: Path) -> None:
    recipe = resolve_recipe({**tiny_values(tmp_path, targets="online"), "method": "mse"})
    build_shards.run(recipe)
    check_same(recipe, count=1)


def test_the_forward_in_bf16_sees_the_same_pixels(tmp_path: Path) -> None:
    """Rendering happens within the engine's autocast, which must not reach its products."""
    recipe = tiny_recipe(tmp_path, targets="online")
    with torch.autocast("cpu", torch.bfloat16):
        check_same(recipe, count=1)


def test_a_run_may_go_on_with_the_other_renderer() -> None:
    values = {"name": "a", "data": {"images": ["x"]}, "teacher": {"kind": "timm", "name": "v"}}
    values["teacher"] |= {"weights": "w", "input": [256, 128]}
    recipe = resolve_recipe(values)
    assert recipe.science() == with_train(recipe, render="device").science()


def test_a_task_that_was_not_told_refuses_originals(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, targets="online")
    manifest, pool = world_of(recipe)
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, Path("no taught teacher"))
    assert isinstance(task, AlignmentTask)
    told = with_train(recipe, render="device")
    batches = make_loader(told, manifest, pool, task, caches, World(0, 1, 0)).batches(0)
    with pytest.raises(AssertionError, match=r"train\.render=loader"):
        task(next(batches), Moment(0, 6, manifest.num_samples, 8))
    batches.close()


def test_saip_has_no_views_for_the_device(tmp_path: Path) -> None:
    values = {**tiny_values(tmp_path, render="device"), "method": "saip", "teacher": None}
    with pytest.raises(ConfigError, match=r"train\.render=device .*saip.* train\.render=loader"):
        resolve_recipe(values)
