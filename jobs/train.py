"""`dpal train`: join shards, targets, student and engine, and run the loop.

Start here to read the main path: recipe -> this file -> dpal/trainer.py -> dpal/task.py ->
dpal/objective.py.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.ranks import num_nodes, spawn_ranks
from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.feature_cache import TargetCache
from data_tools.loader import Loader, Slice
from data_tools.local_cache import open_local_cache
from data_tools.manifest import Manifest
from data_tools.order import Order, num_lanes
from data_tools.raw_samples import RawSamples
from data_tools.saip_samples import SaipSamples
from data_tools.sample import SampleRenderer
from data_tools.skips import SkipList
from data_tools.storage import open_store
from dpal import checkpoint
from dpal.alignment import AlignmentTask
from dpal.base.errors import EXIT_DONE, EXIT_RUN_AGAIN, ConfigError, DpalError, StopRequested
from dpal.base.layout import RunLayout
from dpal.base.memory import keep_freed_memory
from dpal.base.recipe import Recipe
from dpal.base.saip import Saip
from dpal.base.signals import StopSignal
from dpal.base.telemetry import Telemetry
from dpal.engine import Engine
from dpal.first_rank import by_rank_0
from dpal.method.build import build_task
from dpal.ranks import World, lost_peers_told
from dpal.saip.views import SaipPlan
from dpal.target_source import CachedTargets, OnlineTargets, TargetSource
from dpal.task import Task
from dpal.trainer import EventLog, Schedule, Trainer
from dpal.views.plan import ViewPlan
from jobs.cache_features import calibrate
from jobs.caching.plan import cache_of, covariance_of, single_teacher_recipes, teacher_of
from jobs.learned import learned_line, learned_manifest
from jobs.metrics import open_telemetry
from jobs.parity import require_parity
from jobs.saved_recipe import credentials, save_recipe
from jobs.stage import StageResult


def run(recipe: Recipe) -> StageResult:
    """Train to the end of the schedule, from the last committed checkpoint if there is one.

    Raises:
        StopRequested: stopped by a signal with its state committed; run it again.
        ConfigError, DataError, StorageError: what a user can mend.
    """
    layout = RunLayout(recipe.run_dir)
    manifest = learned_manifest(recipe)
    total = Schedule.of(recipe, manifest.num_samples).total
    restored = checkpoint.latest(layout.checkpoints)
    if restored is not None:
        checkpoint.check_same_science(restored, science_of(recipe, manifest))
        if restored.step >= total:
            return StageResult("train", True, f"{total} steps were done before")
    world, num_ranks = World.from_environment(), recipe.train.processes * num_nodes()
    spawning = "RANK" not in os.environ and num_ranks > 1
    _check_world(recipe, num_ranks if spawning else world.size)
    if world.rank == 0:
        save_recipe(recipe)
    if spawning:
        _spawn(recipe, layout)
    elif not train_rank(recipe, manifest, world):
        raise StopRequested(f"stopped with a committed checkpoint in {layout.checkpoints}")
    return StageResult("train", False, f"{total} steps of {recipe.train.global_batch} images")


def science_of(recipe: Recipe, manifest: Manifest) -> dict[str, Any]:
    """What decides what is learned, by dotted key: of the recipe, and which images they are."""
    return {**recipe.science(), "data.shards": manifest.digest}


def train_rank(recipe: Recipe, manifest: Manifest, world: World) -> bool:
    """What one rank does; True when the schedule is done."""
    layout = RunLayout(recipe.run_dir)
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    with StopSignal.listening() as stop, lost_peers_told(world):
        telemetry = open_telemetry(
            recipe.train.metrics_port if world.rank == 0 else 0, recipe.name, "train.metrics_port"
        )
        pool = load_backgrounds(recipe)
        sources, caches = target_sources(recipe, manifest, pool, telemetry)
        found = checkpoint.latest(layout.checkpoints)

        def look() -> None:
            step = found.step if found is not None else 0
            _tell(learned_line(recipe, manifest))
            _tell(require_parity(recipe, manifest, pool, caches, step))

        by_rank_0(world, look)
        task = build_task(recipe, sources, layout.teacher)
        source = make_loader(
            recipe, manifest, pool, task, caches, world, telemetry, skipped=layout.skipped
        )
        restored = checkpoint.load(found) if found is not None else None
        engine = Engine(task, recipe.train, world, restored)
        events = EventLog(layout.events, enabled=world.rank == 0)
        _write_start(events, engine, world)
        folder = layout.checkpoints
        try:
            science = science_of(recipe, manifest)
            trainer = Trainer(recipe, science, engine, source, folder, events, telemetry, stop)
            return trainer.run()
        finally:
            events.close()
            engine.close()


def target_sources(
    recipe: Recipe, manifest: Manifest, pool: BackgroundPool, telemetry: Telemetry | None = None
) -> tuple[list[TargetSource], list[TargetCache]]:
    """Every teacher's targets: from finished caches, or from the teachers themselves."""
    sources: list[TargetSource] = []
    caches = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learns = bool(recipe.aligned_teachers)  # a teacher beside SAIP is there for comparison
    for index, single in enumerate(single_teacher_recipes(recipe) if learns else ()):
        if recipe.train.targets == "cached":
            cache = cache_of(single, manifest, pool, telemetry)
            sources.append(CachedTargets(cache.header, index, covariance_of(single, cache)))
            caches.append(cache)
        else:
            cache = calibrate(single)
            teacher = teacher_of(single).to(device)
            sources.append(OnlineTargets(teacher, cache.header, covariance_of(single, cache)))
    return sources, caches


def make_loader(
    recipe: Recipe,
    manifest: Manifest,
    pool: BackgroundPool,
    task: Task,
    caches: Sequence[TargetCache],
    world: World,
    telemetry: Telemetry | None = None,
    skipped: Path | None = None,
) -> Loader:
    """This rank's batches, rendered as the task needs them.

    Args:
        skipped: where damaged samples are listed; None lists them nowhere.
    """
    spec, copies = recipe.train, open_local_cache(recipe.storage)
    order = Order(
        recipe.seed + spec.seed,
        [ref.num_samples for ref in manifest.shards],
        global_batch=spec.global_batch,
        lanes=spec.lanes,
        window=spec.window,
    )
    if isinstance(task, AlignmentTask):
        samples = RawSamples if spec.render == "device" else AlignedSamples
        renderer: SampleRenderer = samples(
            manifest,
            ViewPlan(recipe.seed, recipe.views, spec.seed),
            pool,
            task.needs,
            caches,
            shards_at_once=order.shards_at_once(world.size),
            copies=copies,
        )
    else:
        assert isinstance(recipe.method, Saip)
        local_crops = recipe.method.local_crops
        renderer = SaipSamples(SaipPlan(recipe.seed + spec.seed, recipe.views, local_crops), pool)
    budget = int(recipe.data.max_skip_fraction * manifest.num_samples) // world.size
    return Loader(
        open_store(recipe.data.shards, recipe.storage, telemetry=telemetry),
        manifest,
        order,
        renderer,
        Slice(spec.global_batch, spec.micro_batch, world.rank, world.size),
        skips=SkipList(budget, skipped, telemetry),
        max_pixels=recipe.data.max_pixels,
        threads=spec.loader_threads,
        prefetch=spec.prefetch,
        copies=copies,
        telemetry=telemetry,
    )


def _tell(line: str) -> None:
    if line:
        print(line, flush=True)


def _write_start(events: EventLog, engine: Engine, world: World) -> None:
    counts = engine.num_parameters()
    events.write("start", engine.steps_done, num_parameters=counts, world_size=world.size)


def _check_world(recipe: Recipe, num_ranks: int) -> None:
    spec = recipe.train
    if spec.global_batch % (spec.micro_batch * num_ranks):
        raise ConfigError(
            f"train.global_batch={spec.global_batch} is not a multiple of train.micro_batch="
            f"{spec.micro_batch} times {num_ranks} processes"
        )
    lanes = num_lanes(spec.lanes, spec.global_batch)
    if lanes % num_ranks:
        shared = range(num_ranks, max(spec.lanes, num_ranks) + 1, num_ranks)
        fit = max(number for number in shared if spec.global_batch % number == 0)
        raise ConfigError(
            f"train.lanes={spec.lanes} with train.global_batch={spec.global_batch} makes {lanes} "
            f"lanes, which {num_ranks} processes cannot share; accepted is train.lanes={fit}, for "
            "instance (the order of samples is then another one)"
        )


def _spawn(recipe: Recipe, layout: RunLayout) -> None:
    """Start the ranks of this node; each reads the resolved recipe from the run folder."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // recipe.train.processes))
    env = {
        "DPAL_SPAWNED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        **credentials(recipe),
    }
    argv = [sys.executable, "-m", "jobs", "train", str(layout.recipe)]
    code = spawn_ranks(argv, recipe.train.processes, env)
    if code == EXIT_RUN_AGAIN:
        raise StopRequested(f"stopped with a committed checkpoint in {layout.checkpoints}")
    if code != EXIT_DONE:
        error = DpalError("a training process failed; its message is above")
        error.exit_code = code
        raise error
