"""Stage `cache`: a Ray batch job that turns every image shard into shards of teacher targets.

The driver hands out shard references, never images. Killing any process, or the whole job, costs
at most the shards in work; the next run does what the ledger lacks.
"""

import time
from typing import NamedTuple

import torch

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.feature_cache import TargetCache, finished_shards, open_cache_store
from data_tools.manifest import Manifest, ShardRef, manifest_of
from dpal.base.layout import RunLayout
from dpal.base.progress import Progress
from dpal.base.recipe import Recipe
from dpal.base.telemetry import (
    CACHE_IMAGES,
    CACHE_SHARDS,
    CACHE_SHARDS_TOTAL,
    Telemetry,
)
from dpal.model.relation_target import attention_projection
from dpal.model.student import build_student
from jobs.caching.plan import definition_of, is_calibrated, single_teacher_recipes
from jobs.caching.ray_job import cache_shards
from jobs.caching.worker import ShardWorker
from jobs.metrics import open_telemetry
from jobs.stage import StageResult


def run(recipe: Recipe, telemetry: Telemetry | None = None) -> StageResult:
    """Cache every teacher's targets of every shard that has none.

    Teachers come one after the other, each into a folder of its own; one whose cache is complete
    is not loaded, and where nothing is missing Ray is not started.

    Raises:
        ConfigError: for a teacher, or a student of timm, that there is not, and for a teacher
            that cannot teach TinyMIM.
        DataError: for missing or damaged shards, or a shard that keeps killing its actor.
        StopRequested: after SIGTERM, SIGINT or SIGUSR1; finished shards stay.
    """
    if not recipe.aligned_teachers:  # a teacher beside SAIP is there for comparison
        return StageResult("cache", True, f"method.kind={recipe.method.kind} has no targets")
    telemetry = telemetry or open_telemetry(
        recipe.cache.metrics_port, recipe.name, "cache.metrics_port"
    )
    manifest = manifest_of(recipe)
    pool = load_backgrounds(recipe)
    plans = [_Plan.of(one, manifest, pool) for one in single_teacher_recipes(recipe)]
    shards, done = len(manifest.shards), sum(plan.num_done for plan in plans)
    telemetry.report(CACHE_SHARDS_TOTAL, shards * len(plans))
    telemetry.report(CACHE_SHARDS, done)
    if recipe.student.family == "timm" and any(plan.has_work for plan in plans):
        build_student(recipe.student)  # a name that timm does not know costs no cache
    if recipe.method.kind == "tinymim" and any(plan.has_work for plan in plans):
        for teacher in recipe.teachers:  # nor does a tap without attention behind it
            attention_projection(teacher, RunLayout(recipe.run_dir).teacher)
    details = []
    for number, plan in enumerate(plans, start=1):
        what = "cache" if len(plans) == 1 else f"cache, teacher {number}/{len(plans)}"
        details.append(_cache(plan, manifest, telemetry, what, done))
        done += len(plan.missing)
    skipped = not any(plan.has_work for plan in plans)
    return StageResult("cache", skipped, "; ".join(details))


def calibrate(recipe: Recipe) -> TargetCache:
    """The cache of the recipe's one teacher, with header and covariance; uses no Ray.

    What is not there is fitted and published. Training with an online teacher needs it for the
    shape mask, the target space, and the parity of both modes.
    """
    return ShardWorker(recipe, threads=torch.get_num_threads()).calibrate()


class _Plan(NamedTuple):
    """What is left to do for one teacher.

    Attributes:
        recipe: with this teacher alone.
        digest: address of its cache.
        missing: shards without targets.
        num_done: shards with targets.
        calibrated: whether header and covariance are as the recipe needs them.
    """

    recipe: Recipe
    digest: str
    missing: list[ShardRef]
    num_done: int
    calibrated: bool

    @staticmethod
    def of(recipe: Recipe, manifest: Manifest, pool: BackgroundPool) -> "_Plan":
        definition = definition_of(recipe, manifest, pool)
        store = open_cache_store(recipe, definition)
        finished = finished_shards(store)
        missing = [ref for ref in manifest.shards if ref.name not in finished]
        done = len(manifest.shards) - len(missing)
        return _Plan(recipe, definition.digest, missing, done, is_calibrated(store, recipe))

    @property
    def has_work(self) -> bool:
        return bool(self.missing) or not self.calibrated


def _cache(plan: _Plan, manifest: Manifest, telemetry: Telemetry, what: str, before: int) -> str:
    """Do what one teacher lacks; returns a line about it. `before`: shards done by all."""
    where, total = f"targets-{plan.digest}", len(manifest.shards)
    if not plan.has_work:
        return f"{where}: {total} shards are there"
    started, images, shards = time.monotonic(), 0, plan.num_done
    done = manifest.num_samples - sum(ref.num_samples for ref in plan.missing)
    with Progress(what, manifest.num_samples, "image", initial=done) as progress:
        progress.prepare("starting Ray and the teacher")
        for ref, seen in cache_shards(plan.recipe, plan.missing, progress.begin):
            images, shards, before = images + seen, shards + 1, before + 1
            telemetry.report(CACHE_IMAGES, seen)
            telemetry.report(CACHE_SHARDS, before)
            progress.advance(ref.num_samples, f"{shards}/{total} shards")
    seconds = time.monotonic() - started
    if not plan.missing:
        return f"{where}: {total} shards are there, calibration in {seconds:.0f} s"
    return f"{where}: {len(plan.missing)} shards, {images} views in {seconds:.0f} s"
