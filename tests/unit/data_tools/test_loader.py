"""The loader: the same samples on any number of ranks, after any restart; faults are told."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import TargetCache
from data_tools.loader import Loader, Slice
from data_tools.manifest import load_manifest
from data_tools.storage import LocalStore, open_store
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe
from dpal.batch import Needs, TrainBatch
from dpal.views import ViewPlan

from tiny import tiny_recipe
from tiny_scenes import ARMS, arm_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path)


def loader(
    recipe: Recipe, part: Slice, cache: TargetCache | None = None, threads: int = 2
) -> Loader:
    store = open_store(recipe.data.shards, recipe.storage)
    manifest, cache_dir = load_manifest(store), recipe.run_dir / "shard-cache"
    renderer = AlignedSamples(
        manifest,
        ViewPlan(recipe.seed, recipe.views),
        load_backgrounds(recipe),
        Needs(crops=True, composite=True, boxes=recipe.loss.relation_level == "instances"),
        () if cache is None else (cache,),
        cache_dir,
    )
    return Loader(
        store,
        manifest,
        recipe.seed,
        renderer,
        part,
        max_pixels=recipe.data.max_pixels,
        threads=threads,
        prefetch=2,
        cache_dir=cache_dir,
    )


def read(recipe: Recipe, part: Slice, start: int, count: int, threads: int = 2) -> list[TrainBatch]:
    batches = loader(recipe, part, threads=threads).batches(start)
    found = list(islice(batches, count))
    batches.close()
    return found


def test_two_ranks_read_what_one_rank_reads(recipe: Recipe) -> None:
    alone = read(recipe, Slice(8, 8, 0, 1), 0, 12)  # past the end of the first epoch
    halves = [read(recipe, Slice(8, 4, rank, 2), 0, 12, threads=1) for rank in range(2)]
    for whole, first, second in zip(alone, *halves, strict=True):
        assert whole.keys == first.keys + second.keys
        for name in ("base", "crops", "composite", "photometric"):
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            assert np.array_equal(getattr(whole, name), joined), name


@pytest.mark.parametrize("arm", ARMS)
def test_two_ranks_read_the_same_composites_boxes_and_noise(tmp_path: Path, arm: str) -> None:
    recipe = arm_recipe(tmp_path, arm)
    alone = read(recipe, Slice(8, 8, 0, 1), 0, 6)  # past the end of the first epoch
    halves = [read(recipe, Slice(8, 4, rank, 2), 0, 6, threads=1) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        for name in ("composite", "photometric"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(getattr(whole, name), joined), name
        if arm == "instances":
            counts = np.concatenate([part.boxes.counts for part in parts])
            assert np.array_equal(whole.boxes.counts, counts)
            rows = [row for part in parts for row in part.boxes.corners]
            for own, row, count in zip(whole.boxes.corners, rows, counts, strict=True):
                assert np.array_equal(own[:count], row[:count])
                assert not own[count:].any()


def test_pinned_noise_returns_with_its_view_while_that_of_crops_is_fresh(tmp_path: Path) -> None:
    batches = read(arm_recipe(tmp_path, "pinned"), Slice(8, 8, 0, 1), 0, 15)  # three epochs
    seen: dict[str, list[tuple[bytes, np.ndarray]]] = {}
    for batch in batches:
        for key, view, noise in zip(batch.keys, batch.base, batch.photometric, strict=True):
            seen.setdefault(key, []).append((view.tobytes(), noise))
    for views in seen.values():
        # Two views in three epochs: one of them was seen twice.
        pixels = [view for view, _noise in views]
        a, b = next((i, j) for j in range(3) for i in range(j) if pixels[i] == pixels[j])
        assert np.array_equal(views[a][1][:2], views[b][1][:2])
        assert not np.array_equal(views[a][1][2:], views[b][1][2:])
        other = 3 - a - b
        assert not np.array_equal(views[a][1][0], views[other][1][0])


def test_composites_of_two_images_need_shards_of_two(tmp_path: Path) -> None:
    recipe = arm_recipe(tmp_path, "two", data={"samples_per_shard": 39})  # 39 and 1
    with pytest.raises(DataError, match=r"alone in its shard.*data\.samples_per_shard"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_resume_twice_yields_the_same_batches(recipe: Recipe) -> None:
    through = read(recipe, Slice(8, 4, 0, 1), 0, 14)  # two micro-batches a step
    resumed = [
        *read(recipe, Slice(8, 4, 0, 1), 0, 6),
        *read(recipe, Slice(8, 4, 0, 1), 3, 4, threads=4),
        *read(recipe, Slice(8, 4, 0, 1), 5, 4, threads=1),
    ]
    assert [batch.keys for batch in through] == [batch.keys for batch in resumed]
    assert all(
        np.array_equal(a.base, b.base) and np.array_equal(a.crops, b.crops)
        for a, b in zip(through, resumed, strict=True)
    )


def test_an_epoch_holds_every_key_once_and_the_next_one_is_shuffled_anew(recipe: Recipe) -> None:
    keys = [key for batch in read(recipe, Slice(8, 8, 0, 1), 0, 10) for key in batch.keys]
    first, second = keys[:40], keys[40:]
    assert len(set(first)) == 40
    assert sorted(first) == sorted(second)
    assert first != second


def test_local_crops_are_fresh_in_every_epoch_but_base_views_return(recipe: Recipe) -> None:
    batches = read(recipe, Slice(8, 8, 0, 1), 0, 15)  # three epochs of five steps
    rows = {}
    for step, batch in enumerate(batches):
        for i, key in enumerate(batch.keys):
            rows.setdefault(key, []).append((step // 5, batch.base[i], batch.crops[i]))
    views = [value for value in rows.values() if len(value) == 3]
    assert views
    assert all(not np.array_equal(a[2], c[2]) for a, _, c in views)
    # With two views per image, the view of epoch 2 is that of epoch 0 or of epoch 1.
    assert all(np.array_equal(c[1], a[1]) or np.array_equal(c[1], b[1]) for a, b, c in views)


def test_a_damaged_shard_stops_the_run_and_is_named(recipe: Recipe) -> None:
    shard = Path(recipe.data.shards) / "persons-000002.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match="persons-000002"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_a_missing_shard_stops_the_run_and_is_named(recipe: Recipe) -> None:
    (Path(recipe.data.shards) / "persons-000001.tar").unlink()
    with pytest.raises(DataError, match="persons-000001"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_a_target_cache_of_other_images_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    from jobs.cache_plan import cache_of

    from tiny import fill_cache

    fill_cache(recipe)
    store = LocalStore(Path(recipe.data.shards))
    manifest = load_manifest(store)
    cache = cache_of(recipe, manifest, load_backgrounds(recipe))
    other = replace(
        manifest, shards=tuple(ref._replace(keys_digest="0" * 64) for ref in manifest.shards)
    )
    with pytest.raises(DataError, match="other images"):
        cache.shard("view-0", other.shards[0])
