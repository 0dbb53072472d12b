"""Training on the finished part of a cache: which shards those are is decided once."""

import json
from itertools import islice
from pathlib import Path

import pytest

from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import LedgerRow
from data_tools.manifest import manifest_of
from data_tools.shard import read_shard
from data_tools.storage import LocalStore
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.method.build import build_task
from dpal.ranks import World
from jobs import build_shards
from jobs.caching.plan import single_teacher_recipes
from jobs.caching.worker import ShardWorker
from jobs.learned import learned_line, learned_manifest
from jobs.train import make_loader, science_of, target_sources

from tiny import fill_cache, tiny_recipe, tiny_values, write_persons


def partial(folder: Path, finished: tuple[int, ...], **train: object) -> Recipe:
    """A recipe of four shards, some of which are cached."""
    write_persons(folder / "persons", 40)
    recipe = tiny_recipe(folder, partial=True, **train)
    worker = ShardWorker(recipe)
    worker.calibrate()
    for number in finished:
        worker.cache_shard(worker.manifest.shards[number])
    return recipe


def keys_of(recipe: Recipe, steps: int) -> list[tuple[str, ...]]:
    manifest, pool = learned_manifest(recipe), load_backgrounds(recipe)
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, Path("no taught teacher"))
    batches = make_loader(recipe, manifest, pool, task, caches, World(0, 1, 0)).batches(0)
    found = [batch.keys for batch in islice(batches, steps)]
    batches.close()
    return found


def test_a_run_learns_from_finished_shards_and_keeps_to_them(tmp_path: Path) -> None:
    recipe = partial(tmp_path, (0, 2))
    whole = manifest_of(recipe)
    learned = learned_manifest(recipe)
    assert learned.shards == (whole.shards[0], whole.shards[2])
    assert "learning from 2 shards, 20 samples" in learned_line(recipe, learned)
    before = keys_of(recipe, 5)
    store = LocalStore(Path(recipe.data.shards))
    finished = {key for ref in learned.shards for key in read_shard(store, ref, None).keys}
    assert {key for keys in before for key in keys} == finished

    fill_cache(recipe)  # the rest is finished in between
    assert learned_manifest(recipe) == learned
    assert keys_of(recipe, 5) == before
    again = recipe.model_copy(update={"name": "again"})
    assert learned_manifest(again).shards == whole.shards


def test_a_finished_cache_gives_the_run_that_asks_for_no_part(tmp_path: Path) -> None:
    recipe = partial(tmp_path, (0, 1, 2, 3))
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"partial": False})})
    assert science_of(recipe, learned_manifest(recipe)) == science_of(plain, manifest_of(plain))
    assert learned_line(plain, manifest_of(plain)) == ""


def test_another_part_is_another_run(tmp_path: Path) -> None:
    recipe = partial(tmp_path, (1,))
    science = science_of(recipe, learned_manifest(recipe))
    whole = science_of(recipe, manifest_of(recipe))
    assert [key for key in whole if whole[key] != science[key]] == ["data.shards"]


def test_a_shard_counts_when_every_teacher_has_seen_it(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, partial=True)
    more = {"more_teachers": [values["teacher"] | {"tap": "block3"}]}
    recipe = resolve_recipe({**values, **more, "loss": {"targets": "standardised"}})
    build_shards.run(recipe)
    for single, numbers in zip(single_teacher_recipes(recipe), ((0, 1), (1, 3)), strict=True):
        worker = ShardWorker(single)
        worker.calibrate()
        for number in numbers:
            worker.cache_shard(worker.manifest.shards[number])
    assert learned_manifest(recipe).shards == (manifest_of(recipe).shards[1],)


def test_too_little_to_learn_from_is_refused_and_nothing_is_decided(tmp_path: Path) -> None:
    recipe = partial(tmp_path, (), global_batch=16, micro_batch=16)
    with pytest.raises(DataError, match="no shard has all of its targets yet"):
        learned_manifest(recipe)
    worker = ShardWorker(recipe)
    worker.cache_shard(worker.manifest.shards[3])
    with pytest.raises(DataError, match=r"1 of 4 shards with 10 samples.*global_batch=16"):
        learned_manifest(recipe)
    assert not RunLayout(recipe.run_dir).shards.exists()
    worker.cache_shard(worker.manifest.shards[0])
    assert learned_manifest(recipe).num_samples == 20


@pytest.mark.parametrize("damage", ["text", "list", "data", "name", "empty", "twice"])
def test_a_damaged_list_of_shards_is_refused(tmp_path: Path, damage: str) -> None:
    recipe = partial(tmp_path, (0, 2))
    learned_manifest(recipe)
    path = RunLayout(recipe.run_dir).shards
    plain = json.loads(path.read_text())
    damaged = {
        "text": "{",
        "list": "[]",
        "data": json.dumps({**plain, "data": "0" * 16}),
        "name": json.dumps({**plain, "shards": ["persons-000009.tar", *plain["shards"]]}),
        "empty": json.dumps({**plain, "shards": []}),
        "twice": json.dumps({**plain, "shards": "persons-000000.tar"}),
    }[damage]
    path.write_text(damaged)
    with pytest.raises(DataError, match=r"shards.json' is damaged, or was written for other"):
        learned_manifest(recipe)


def test_a_shard_that_was_lost_since_is_told(tmp_path: Path) -> None:
    recipe = partial(tmp_path, (0, 2))
    learned = learned_manifest(recipe)
    (folder,) = Path(recipe.cache.url).glob("targets-*")
    row = folder / "ledger" / "persons-000002.json"
    LedgerRow.from_json(row.read_bytes(), "row")
    row.unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 2 shards, first 'persons-000002.tar'"):
        target_sources(recipe, learned, load_backgrounds(recipe))


def test_a_part_without_cached_targets_is_refused_when_the_recipe_is_read(tmp_path: Path) -> None:
    values = tiny_values(tmp_path, partial=True, targets="online")
    with pytest.raises(ConfigError, match=r"train\.partial=true has no effect"):
        resolve_recipe(values)
