"""Stage `cache`: a Ray batch job that turns every image shard into shards of teacher targets.

The driver hands out shard references, never images. Killing any process, or the whole job, costs
at most the shards in work; the next run does what the ledger lacks.
"""

import time

from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import finished_shards, open_cache_store
from data_tools.manifest import load_manifest
from data_tools.storage import open_store
from dpal.base.progress import Progress
from dpal.base.recipe import Recipe
from dpal.base.telemetry import (
    CACHE_IMAGES,
    CACHE_SHARDS,
    CACHE_SHARDS_TOTAL,
    Telemetry,
)
from dpal.targets import TargetHeader
from jobs.cache_plan import definition_of
from jobs.cache_ray import cache_shards
from jobs.cache_worker import ShardWorker
from jobs.metrics import open_telemetry
from jobs.stage import StageResult


def run(recipe: Recipe, telemetry: Telemetry | None = None) -> StageResult:
    """Cache the targets of every shard that has none; without any, Ray is not started.

    Raises:
        DataError: for missing or damaged shards, or a shard that keeps killing its actor.
        StopRequested: after SIGTERM, SIGINT or SIGUSR1; finished shards stay.
    """
    telemetry = telemetry or open_telemetry(
        recipe.cache.metrics_port, recipe.name, "cache.metrics_port"
    )
    manifest = load_manifest(open_store(recipe.data.shards, recipe.storage))
    definition = definition_of(recipe, manifest, load_backgrounds(recipe))
    store = open_cache_store(recipe, definition)
    finished = finished_shards(store)
    missing = [ref for ref in manifest.shards if ref.name not in finished]
    telemetry.report(CACHE_SHARDS_TOTAL, len(manifest.shards))
    telemetry.report(CACHE_SHARDS, len(manifest.shards) - len(missing))
    where = f"targets-{definition.digest}"
    if not missing:
        return StageResult("cache", True, f"{where}: {len(manifest.shards)} shards are there")
    started, images = time.monotonic(), 0
    done = manifest.num_samples - sum(ref.num_samples for ref in missing)
    shards = len(manifest.shards) - len(missing)
    with Progress("cache", manifest.num_samples, "image", initial=done) as progress:
        for ref, seen in cache_shards(recipe, missing):
            images, shards = images + seen, shards + 1
            telemetry.report(CACHE_IMAGES, seen)
            telemetry.report(CACHE_SHARDS, shards)
            progress.advance(ref.num_samples, f"{shards}/{len(manifest.shards)} shards")
    seconds = time.monotonic() - started
    detail = f"{where}: {len(missing)} shards, {images} views in {seconds:.0f} s"
    return StageResult("cache", False, detail)


def calibrate(recipe: Recipe, threads: int = 1) -> TargetHeader:
    """The header of the recipe's cache, published if it is not there; uses no Ray.

    Training with an online teacher needs it for the shape mask and the parity of both modes.
    """
    worker = ShardWorker(recipe, threads=threads)
    return worker.calibrate().header
