"""Shards and targets in object storage give the batches that local ones give."""

from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.backgrounds import load_backgrounds
from data_tools.manifest import load_manifest
from data_tools.storage import open_store
from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.method.build import build_task
from dpal.ranks import World
from jobs import build_shards
from jobs.train import make_loader, target_sources

from seaweed import S3Server
from tiny import fill_cache, tiny_values


def first_batches(recipe: Recipe, count: int = 6) -> list[TrainBatch]:
    """The first batches of a run whose shards and targets are complete."""
    manifest = load_manifest(open_store(recipe.data.shards, recipe.storage))
    pool = load_backgrounds(recipe)
    sources, caches = target_sources(recipe, manifest, pool)
    task = build_task(recipe, sources, Path("no taught teacher"))
    batches = make_loader(recipe, manifest, pool, task, caches, World(0, 1, 0)).batches(0)
    found = list(islice(batches, count))
    batches.close()
    return found


def test_a_run_from_object_storage_reads_what_a_local_run_reads(
    s3_server: S3Server, tmp_path: Path
) -> None:
    values = tiny_values(tmp_path)
    local = resolve_recipe(values)
    base = s3_server.url()
    remote = resolve_recipe(
        {
            **values,
            "name": "remote",
            "data": {**values["data"], "shards": f"{base}/shards"},
            "cache": {**values["cache"], "url": f"{base}/targets"},
        }
    ).model_copy(update={"storage": s3_server.storage(copies=str(tmp_path / "copies"))})
    for recipe in (local, remote):
        build_shards.run(recipe)
        fill_cache(recipe)
        assert build_shards.run(recipe).skipped
    for mine, theirs in zip(first_batches(local), first_batches(remote), strict=True):
        assert mine.keys == theirs.keys
        for name in ("base", "crops", "composite"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        assert np.array_equal(mine.records[0].base, theirs.records[0].base)
        assert np.array_equal(mine.records[0].composite, theirs.records[0].composite)
    fetched = list((tmp_path / "copies").rglob("*.tar"))
    assert len(fetched) == 16, "four image shards and twelve target tars, each fetched once"
