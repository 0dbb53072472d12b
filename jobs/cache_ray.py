"""The Ray side of the cache: actors that hold the teacher, and shard references handed to them."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.manifest import ShardRef
from dpal.base.errors import ConfigError, DataError, DpalError, StopRequested
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal

RETRIES = 3  # of a shard whose actor died
POLL_S = 0.5  # how soon a stop request is noticed
OBJECT_STORE_BYTES = 80 * 2**20  # near Ray's least: only references travel


class TeacherActor:
    """One process with one teacher; everything that can fail happens in a call that tells it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._worker: Any = None

    def prepare(self) -> None:
        """Load the teacher and publish the header where there is none."""
        from jobs.cache_worker import ShardWorker  # torch is imported in the actor only

        cache = self.recipe.cache
        threads = max(1, int(cache.cpus_per_actor))
        device = "cuda" if cache.gpus_per_actor else "cpu"
        self._worker = ShardWorker(self.recipe, threads=threads, device=device)
        self._worker.calibrate()

    def cache_shard(self, ref: ShardRef) -> int:
        """Cache one shard; a restarted actor prepares itself first."""
        if self._worker is None:
            self.prepare()
        return int(self._worker.cache_shard(ref))


def cache_shards(recipe: Recipe, refs: Sequence[ShardRef]) -> Iterator[tuple[ShardRef, int]]:
    """Cache `refs` on Ray and yield (shard, views the teacher saw) as they finish, in any order.

    The calibration comes first, if the cache lacks it; without `refs` it is all that is done.
    An actor that dies is started again and its shard retried; Ray counts the retries.

    Raises:
        StopRequested: after a stop signal.
        DataError: naming a shard whose actor died more than `RETRIES` times.
    """
    with _session(recipe) as ray, StopSignal.listening() as stop:
        make = ray.remote(TeacherActor).options(
            num_cpus=recipe.cache.cpus_per_actor,
            num_gpus=recipe.cache.gpus_per_actor,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        recipe = _absolute(recipe)
        count = max(1, min(recipe.cache.actors, len(refs)))
        actors = [make.remote(recipe) for _ in range(count)]
        # The first actor alone fits the header; the others find it published.
        _result(ray, _wait(ray, {actors[0].prepare.remote(): None}, stop), "the calibration")
        waiting = list(reversed(refs))
        working = {}
        for actor in actors[: len(refs)]:
            ref = waiting.pop()
            working[actor.cache_shard.remote(ref)] = (actor, ref)
        while working:
            done = _wait(ray, working, stop)
            actor, ref = working.pop(done)
            views = _result(ray, done, f"shard {ref.name!r}")
            if waiting:
                following = waiting.pop()
                working[actor.cache_shard.remote(following)] = (actor, following)
            yield ref, views


def _wait(ray: Any, working: dict[Any, Any], stop: StopSignal) -> Any:
    """The next finished call of `working`. Raises StopRequested."""
    while True:
        ready, _ = ray.wait(list(working), num_returns=1, timeout=POLL_S)
        if ready:
            return ready[0]
        if stop:
            raise StopRequested("caching stopped on request; run it again for the other shards")


def _result(ray: Any, call: Any, what: str) -> Any:
    errors = ray.exceptions
    try:
        return ray.get(call)
    except errors.RayTaskError as error:
        if isinstance(error.cause, DpalError):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError) as error:
        raise DataError(
            f"{what} ended its teacher actor {RETRIES + 1} times ({type(error).__name__}); "
            "give it more memory, or lower teacher.batch_size or data.samples_per_shard"
        ) from None


@contextmanager
def _session(recipe: Recipe) -> Iterator[Any]:
    """Ray, started here or joined, and left again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cache, quiet = recipe.cache, {"log_to_driver": False, "logging_level": "ERROR"}
    local = cache.ray_address == "local"
    if local:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # nobody else on this machine joins
    import ray  # only now: the import takes a second, and reads the environment

    try:
        if local:
            ray.init(
                address="local",
                num_cpus=math.ceil(cache.actors * cache.cpus_per_actor),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        else:
            ray.init(address=cache.ray_address, **quiet)
    except (ConnectionError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cache.ray_address={cache.ray_address!r}: no Ray cluster answers ({reason}); "
            "accepted are 'local', 'auto' and ray://host:port"
        ) from None
    try:
        _check_gpus(ray, recipe, local)
        yield ray
    finally:
        ray.shutdown()


def _check_gpus(ray: Any, recipe: Recipe, local: bool) -> None:
    """A GPU that is not there would be waited for without end; a cluster may still bring one."""
    wanted, there = recipe.cache.gpus_per_actor, ray.cluster_resources().get("GPU", 0)
    if local and wanted > there:
        raise ConfigError(
            f"cache.gpus_per_actor={wanted}: this machine has {there:g} GPUs; "
            "accepted is 0, or another cache.ray_address"
        )


def _absolute(recipe: Recipe) -> Recipe:
    """Local paths spelled out: an actor's working folder is not the driver's."""
    teacher: dict[str, str] = {}
    if getattr(recipe.teacher, "weights", ""):
        teacher["weights"] = _full(recipe.teacher.weights)  # type: ignore[union-attr]
    return recipe.model_copy(
        update={
            "output": _full(recipe.output),
            "data": recipe.data.model_copy(update={"shards": _full(recipe.data.shards)}),
            "cache": recipe.cache.model_copy(update={"url": _full(recipe.cache.url)}),
            "teacher": recipe.teacher.model_copy(update=teacher),
        }
    )


def _full(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
