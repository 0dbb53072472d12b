"""Batches with cached targets: every row holds the records of its own sample and view."""

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import TargetCache
from data_tools.loader import Loader, Slice
from data_tools.manifest import load_manifest
from data_tools.opened import OPENING
from data_tools.order import Order
from data_tools.skips import SkipList
from data_tools.storage import LocalStore
from data_tools.synthetic.scene import PERSON_SIZE
from data_tools.target_tar import TargetShard, offset_of
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe
from dpal.batch import Needs, TrainBatch
from dpal.record import stored_spec
from dpal.views.boxes import region_in_view
from dpal.views.plan import ViewPlan
from jobs.caching.plan import cache_of

from tiny import fill_cache, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With a finished cache; not to be changed for good."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("joined"))
    fill_cache(recipe)
    return recipe


def cache_in(recipe: Recipe) -> TargetCache:
    manifest = load_manifest(LocalStore(Path(recipe.data.shards)))
    return cache_of(recipe, manifest, load_backgrounds(recipe))


def read(recipe: Recipe, count: int, needs: Needs, budget: int = 0) -> list[TrainBatch]:
    store = LocalStore(Path(recipe.data.shards))
    manifest = load_manifest(store)
    plan, pool = ViewPlan(recipe.seed, recipe.views), load_backgrounds(recipe)
    order = Order(recipe.seed, [r.num_samples for r in manifest.shards],
                  global_batch=8, lanes=8, window=2)  # fmt: skip
    source = Loader(
        store,
        manifest,
        order,
        # One shard at a time: tars are opened again and again.
        AlignedSamples(manifest, plan, pool, needs, (cache_in(recipe),), shards_at_once=1),
        Slice(8, 8, 0, 1),
        skips=SkipList(budget, recipe.run_dir / "skipped.jsonl"),
        max_pixels=recipe.data.max_pixels,
        threads=2,
        prefetch=2,
    )
    batches = source.batches(0)
    found = list(islice(batches, count))
    batches.close()
    return found


def stored(recipe: Recipe) -> dict[str, dict[str, np.ndarray]]:
    """Records by series and key, from the files."""
    cache, found = cache_in(recipe), {}
    for series in ("view-0", "view-1", "composite-0"):
        of_series = found[series] = {}
        for ref in load_manifest(LocalStore(Path(recipe.data.shards))).shards:
            shard = cache.shard(series, ref)
            of_series.update(zip(shard.keys, shard.records(range(len(shard))), strict=True))
    return found


def test_every_row_has_the_records_of_its_sample_and_view_over_epochs(recipe: Recipe) -> None:
    files, plan = stored(recipe), ViewPlan(recipe.seed, recipe.views)
    batches = read(recipe, 15, Needs(crops=False, composite=True))  # three epochs, all kept
    for number, batch in enumerate(batches):
        epoch = number * 8 // 40
        (records,) = batch.records
        for row, key in enumerate(batch.keys):
            view = f"view-{plan.view_index(key, epoch)}"
            np.testing.assert_array_equal(records.base[row], files[view][key])
            np.testing.assert_array_equal(records.composite[row], files["composite-0"][key])
            assert stored_spec(records.base[row], "view").box[2:] > (0, 0)


def test_targets_that_are_not_needed_any_more_are_not_opened(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops used to wait until every target that it had asked for was fetched."""
    opened, go_on = [], threading.Event()

    def slowly(_cache: TargetCache, series: str, *_args: Any) -> TargetShard:
        opened.append(series)
        go_on.wait(10)
        raise DataError("late")

    monkeypatch.setattr(TargetCache, "shard", slowly)
    manifest = load_manifest(LocalStore(Path(recipe.data.shards)))
    plan, pool = ViewPlan(recipe.seed, recipe.views), load_backgrounds(recipe)
    needs = Needs(crops=False, composite=True)
    samples = AlignedSamples(manifest, plan, pool, needs, (cache_in(recipe),), shards_at_once=4)
    for shard in range(4):
        samples.expect(shard)
    samples.forget()
    go_on.set()
    samples._shards._pool.shutdown()
    assert len(opened) <= OPENING < 4 * 3  # series of each shard


def test_composites_that_are_not_needed_are_not_read(recipe: Recipe) -> None:
    (batch,) = read(recipe, 1, Needs(crops=False, composite=False))
    assert batch.records[0].composite.shape == (8, 0)


def test_a_sample_with_a_damaged_record_is_replaced_or_stops_the_run(recipe: Recipe) -> None:
    cache = cache_in(recipe)
    layout = cache.layout("composite-0")
    path = cache.store.path("composite-0/persons-000001.tar")
    sound = path.read_bytes()
    hurt = bytearray(sound)
    hurt[offset_of(3, layout) + layout.code_start] ^= 1
    shard = cache.shard(
        "composite-0", load_manifest(LocalStore(Path(recipe.data.shards))).shards[1]
    )
    damaged, files = shard.keys[3], stored(recipe)
    path.write_bytes(hurt)
    try:
        with pytest.raises(DataError, match=damaged):
            read(recipe, 5, Needs(crops=False, composite=True))
        batches = read(recipe, 5, Needs(crops=False, composite=True), budget=1)
    finally:
        path.write_bytes(sound)
    keys = [key for batch in batches for key in batch.keys]
    assert damaged not in keys
    for batch in batches:
        for row, name in enumerate(batch.keys):
            np.testing.assert_array_equal(
                batch.records[0].composite[row], files["composite-0"][name]
            )


def test_a_batch_says_where_its_crops_lie_in_the_base_views_that_it_shows(recipe: Recipe) -> None:
    plan = ViewPlan(recipe.seed, recipe.views)
    flips = set()
    for number, batch in enumerate(read(recipe, 10, Needs(crops=True, composite=False))):
        epoch = number * 8 // 40
        assert batch.regions.shape == (8, recipe.views.crops, 4)
        for row, key in enumerate(batch.keys):
            base = stored_spec(batch.records[0].base[row], "view")
            crops = plan.crops(key, plan.view_index(key, epoch), epoch, PERSON_SIZE)
            expected = [region_in_view(crop, base) for crop in crops]
            np.testing.assert_allclose(batch.regions[row], expected, rtol=1e-6)
            flips |= {(base.flip, crop.flip) for crop in crops}
    assert len(flips) == 4
