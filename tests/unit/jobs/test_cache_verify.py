"""`dpal cache --verify`: the job's own records pass; others are named, and end with code 3."""

import shutil
from pathlib import Path

import pytest

from data_tools.feature_cache import TargetCache, series_name
from data_tools.target_tar import TargetTarBuilder
from dpal.base.errors import EXIT_DATA, EXIT_DONE, ConfigError, DataError
from dpal.base.recipe import Recipe
from jobs.__main__ import main
from jobs.caching.verify import run_verify, verify
from jobs.caching.worker import ShardWorker

from tiny import fill_cache, tiny_recipe, with_own_targets

ALL = 120  # records: 40 images, two views and a composite


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = tiny_recipe(tmp_path_factory.mktemp("verify"))
    fill_cache(recipe)
    return recipe


@pytest.fixture
def recipe(cached: Recipe, tmp_path: Path) -> Recipe:
    """A recipe whose complete cache is a copy of its own."""
    return with_own_targets(cached, tmp_path)


def swap(cache: TargetCache, worker: ShardWorker, series: str, row: int, other: int) -> str:
    """Give sample `row` of the first shard the record of `other`; returns its key."""
    ref = worker.manifest.shards[0]
    shard = cache.shard(series, ref)
    records = shard.records(range(len(shard)))
    records[row] = records[other]
    builder = TargetTarBuilder(shard.keys, shard.layout)
    builder.fill(0, records)
    cache.store.put(series_name(series, ref), builder.to_bytes())
    return shard.keys[row]


def test_the_jobs_own_records_are_equal_byte_for_byte(
    cached: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verify(cached, 25) == EXIT_DONE
    told = capsys.readouterr().out
    assert "25 records" in told
    assert "25 are equal byte for byte" in told


def test_a_sample_that_has_anothers_targets_is_named(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = ShardWorker(recipe)
    keys = [swap(worker.cache, worker, series, 3, 4) for series in ("view-1", "composite-0")]
    assert run_verify(recipe, 10 * ALL) == EXIT_DATA
    told = capsys.readouterr().out
    assert f"{ALL - 2} are equal byte for byte" in told
    for series, key in zip(("view-1", "composite-0"), keys, strict=True):
        assert f"{series} of sample {key!r}, shard {worker.manifest.shards[0].name!r}" in told
    assert told.count("smallest cosine") == 2


def test_the_draw_has_a_seed_and_no_repetition(cached: Recipe) -> None:
    worker = ShardWorker(cached)
    first, again, other = (
        [checked.what for checked in verify(worker, 12, seed)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 12


def test_without_a_finished_shard_there_is_nothing_to_verify(recipe: Recipe) -> None:
    shutil.rmtree(next(Path(recipe.cache.url).glob("targets-*/ledger")))
    with pytest.raises(DataError, match="run `dpal cache` first"):
        run_verify(recipe, 5)


def test_verifying_nothing_is_refused(cached: Recipe) -> None:
    with pytest.raises(ConfigError, match="--verify 0"):
        run_verify(cached, 0)


def test_the_command_verifies_and_caches_nothing(
    cached: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(cached.to_yaml())
    assert main(["cache", str(path), "--verify", "4"]) == EXIT_DONE
    assert "4 are equal" in capsys.readouterr().out
