"""Ray for the length of a job: started here or joined, watched, and left again."""

import math
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from dpal.base.errors import ConfigError, StopRequested
from dpal.base.progress import say
from dpal.base.recipe import Recipe

POLL_S = 0.5  # how soon a stop request is noticed
OBJECT_STORE_BYTES = 80 * 2**20  # near Ray's least: only references travel
LOOK_S = 2.0  # between two looks at the head
LONGEST = 39  # bytes of a folder below which the names of Ray's sockets are not too long for Linux
HEAD_S = 20.0  # a head may be away so long; Ray itself ends the process after a minute
GONE = "Ray is gone ({what}); the finished shards stay: run the same command again for the others"
STARTS = 3  # of a Ray of this job alone
LATE = "Ray did not start ({reason}); run the same command again"


class Session:
    """A connected Ray.

    Attributes:
        ray: the module.
        deaths: exceptions that mean that an actor died.
        lost: whether the head was found gone; then Ray cannot be shut down in an orderly way.
    """

    def __init__(self, ray: Any) -> None:
        self.ray, errors = ray, ray.exceptions
        self.deaths = (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError)
        self.lost = False
        self._head = _address(ray)
        self._looked = self._seen = time.monotonic()

    def wait(self, calls: Collection[Any]) -> Any:
        """One finished call of `calls`; None after `POLL_S` without.

        Raises:
            StopRequested: when the head has been away for `HEAD_S`.
        """
        try:
            ready, _ = self.ray.wait(list(calls), num_returns=1, timeout=POLL_S)
        except ConnectionError:  # of ray://, whose server was the only link
            raise self._gone("the connection broke") from None
        if ready:
            return ready[0]
        now = time.monotonic()
        if now - self._looked > LOOK_S:
            self._looked = now
            if self._head is None or _answers(self._head):
                self._seen = time.monotonic()
            elif now - self._seen > HEAD_S:
                raise self._gone("its head does not answer")
        return None

    def require_head(self) -> None:
        """Raise StopRequested unless Ray can start another actor somewhere."""
        if self._head is not None and not _answers(self._head):
            raise self._gone("its head does not answer")
        if not any(node["Alive"] for node in self.ray.nodes()):
            raise self._gone("no node of it is alive")

    def has_room(self, cpus: float, gpus: float) -> bool:
        """Whether a node, were it free, could run an actor of that many CPUs and GPUs."""
        return any(
            node["Alive"]
            and node["Resources"].get("CPU", 0) >= cpus
            and node["Resources"].get("GPU", 0) >= gpus
            for node in self.ray.nodes()
        )

    def _gone(self, what: str) -> StopRequested:
        self.lost = True
        return StopRequested(GONE.format(what=what))


@contextmanager
def open_session(recipe: Recipe, stopped: Callable[[], bool] = lambda: False) -> Iterator[Session]:
    """Ray, started here or joined, and left again.

    Ray gives itself 30 seconds to start; on a machine that has too much to do it is tried again.

    Args:
        stopped: whether a stop was asked for: then it is not tried again.

    Raises:
        ConfigError: when it cannot be had.
        StopRequested: when it did not start in time, as on a machine that has too much to do.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cache = recipe.cache
    local = cache.ray_address == "local"
    if local:
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":  # nobody else joins
            # Ray would write one into the home, which need not be there.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")  # the machine is here for this job
        if len(os.environ.get("TMPDIR", "").encode()) > LONGEST:  # a scheduler's, often
            os.environ.setdefault("RAY_TMPDIR", "/tmp")
    import ray  # only now: the import takes a second, and reads the environment

    _start(ray, recipe, stopped)
    session = Session(ray)
    try:
        _check_gpus(ray, recipe, local)
        yield session
    finally:
        if not session.lost:
            ray.shutdown()


def absolute(recipe: Recipe) -> Recipe:
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


def _start(ray: Any, recipe: Recipe, stopped: Callable[[], bool]) -> None:
    address = recipe.cache.ray_address
    local = address == "local"
    for left in reversed(range(STARTS if local else 1)):
        try:
            with _own_signals():
                return _init(ray, recipe)
        except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            # RuntimeError: the cluster's Ray or Python is of another version.
            reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
            what = "Ray does not start here" if local else "no Ray cluster answers"
            raise ConfigError(
                f"cache.ray_address={address!r}: {what} ({reason}); "
                "accepted are 'local', 'auto' and ray://host:port"
            ) from None
        except Exception as error:  # Ray has no narrower type for what took too long
            ray.shutdown()
            if not left or stopped():
                reason = shorten(str(error), 300, placeholder=" ...")
                raise StopRequested(LATE.format(reason=reason)) from None
            say("cache: Ray did not start in time; trying again")
    return None


def _init(ray: Any, recipe: Recipe) -> None:
    cache, quiet = recipe.cache, {"log_to_driver": False, "logging_level": "ERROR"}
    if cache.ray_address == "local":
        ray.init(
            address="local",
            num_cpus=math.ceil(cache.actors * cache.cpus_per_actor),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )
    else:
        ray.init(address=cache.ray_address, **quiet)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give SIGTERM back to its handler: Ray takes it, and would end the job as if by a bug."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_gpus(ray: Any, recipe: Recipe, local: bool) -> None:
    """A GPU that is not there would be waited for without end; a cluster may still bring one."""
    wanted, there = recipe.cache.gpus_per_actor, ray.cluster_resources().get("GPU", 0)
    if local and wanted > there:
        raise ConfigError(
            f"cache.gpus_per_actor={wanted}: this machine has {there:g} GPUs; "
            "accepted is 0, or another cache.ray_address"
        )


def _address(ray: Any) -> tuple[str, int] | None:
    """Where the head listens; None through ray://, which need not reach it."""
    if ray.util.client.ray.is_connected():
        return None
    host, _colon, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host, int(port)


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True


def _full(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
