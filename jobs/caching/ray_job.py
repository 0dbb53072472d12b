"""The Ray side of the cache: actors that hold the teacher, and shard references handed to them."""

import logging
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from data_tools.manifest import ShardRef
from dpal.base.errors import DataError, DpalError, StopRequested, StorageError
from dpal.base.progress import say
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal
from jobs.caching.schedule import DEPTH, RETRIES, Schedule
from jobs.caching.session import Session, absolute, open_session

PATIENCE_S = 30.0  # without a teacher that is ready, until it is said; then twice as long
DIED = (
    f"ended its teacher actor {RETRIES + 1} times; give it more memory, or lower "
    "teacher.batch_size or data.samples_per_shard"
)


class Answer(NamedTuple):
    """What an actor says about a shard.

    Attributes:
        views: that its teacher saw; 0 when the targets were there.
        batch_size: images in a forward, less than the recipe's where memory is short.
    """

    views: int
    batch_size: int


class TeacherActor:
    """One process with one teacher; everything that can fail happens in a call that tells it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._worker: Any = None
        # A machine that is taken away says SIGTERM first. There is nothing to save, and Ray's own
        # handler would wait for both calls without handing their results on.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def prepare(self) -> None:
        """Load the teacher and publish the header where there is none."""
        from jobs.caching.worker import LOG, ShardWorker  # torch is imported in the actor only

        LOG.addHandler(logging.StreamHandler(sys.stdout))  # Ray's log of this actor
        LOG.setLevel(logging.INFO)
        cache = self.recipe.cache
        threads = max(1, int(cache.cpus_per_actor))
        device = "cuda" if cache.gpus_per_actor else "cpu"
        self._worker = ShardWorker(self.recipe, threads=threads, device=device)
        self._worker.calibrate()
        _ = self._worker.teacher  # two calls that come at once find it loaded

    def cache_shard(self, ref: ShardRef) -> Answer:
        """Cache one shard."""
        views = self._worker.cache_shard(ref)
        return Answer(views, self._worker.forward.size)


def cache_shards(
    recipe: Recipe, refs: Sequence[ShardRef], ready: Callable[[], None] = lambda: None
) -> Iterator[tuple[ShardRef, int]]:
    """Cache `refs` on Ray and yield (shard, views the teacher saw) as they finish, in any order.

    The calibration comes first, if the cache lacks it; without `refs` it is all that is done.
    An actor that dies is replaced and its shards are done again. The order is drawn, so that two
    jobs on one recipe meet at the same shard at the same time as seldom as can be.

    Args:
        ready: called once, when the first actor has its teacher.

    Raises:
        StopRequested: after a stop signal, or when Ray itself is gone.
        DataError: naming a shard that lost more than `RETRIES` actors or deadlines, or the first
            that is damaged: then the others are done before, unless more than `RETRIES` are.
    """
    with StopSignal.listening() as stop, open_session(recipe, lambda: bool(stop)) as session:
        crew = Crew(session, absolute(recipe), stop)
        # The first actor alone fits the header; the others find it published.
        crew.hire()
        crew.await_first()
        ready()
        yield from crew.work(refs)


class Crew:
    """The actors of a job and their open calls."""

    def __init__(self, session: Session, recipe: Recipe, stop: StopSignal) -> None:
        self.session, self.recipe, self.stop = session, recipe, stop
        cache = recipe.cache
        self._make = session.ray.remote(TeacherActor).options(
            num_cpus=cache.cpus_per_actor,
            num_gpus=cache.gpus_per_actor,
            max_concurrency=DEPTH,
            max_restarts=0,  # which shard is done again, and when, is decided here
        )
        self._ready: set[Any] = set()
        self._late: set[Any] = set()
        self._calls: dict[Any, tuple[Any, str]] = {}  # shard name, or "" for `prepare`
        self._told = False
        self._damaged: list[str] = []
        self._failures = 0  # actors in a row that died before they were ready
        self._idle_since, self._patience_s = time.monotonic(), PATIENCE_S

    def hire(self) -> None:
        """Start an actor."""
        actor = self._make.remote(self.recipe)
        self._calls[actor.prepare.remote()] = (actor, "")

    def await_first(self) -> None:
        """Wait until one actor is ready. Raises DataError when several in a row die before."""
        schedule = Schedule((), time.monotonic)
        while not self._ready:
            self._answer(schedule)

    def work(self, refs: Sequence[ShardRef]) -> Iterator[tuple[ShardRef, int]]:
        """Cache `refs`; yields each with the views that a teacher saw for it."""
        by_name = {ref.name: ref for ref in refs}
        names = random.SystemRandom().sample(list(by_name), len(by_name))
        schedule = Schedule(names, time.monotonic)
        for _ in range(min(self.recipe.cache.actors, len(refs)) - 1):
            self.hire()
        while schedule.left:
            for _ in range(DEPTH):  # every actor gets one before any gets two
                for actor in self._ready:
                    name = schedule.take(actor)
                    if name is not None:
                        self._calls[actor.cache_shard.remote(by_name[name])] = (actor, name)
            answered = self._answer(schedule)
            if answered is not None:
                name, answer = answered
                self._tell_smaller(answer.batch_size)
                yield by_name[name], answer.views
        if self._damaged:
            more = len(self._damaged) - 1
            others = f"; {more} more shard{'s' * (more > 1)} failed" if more else ""
            raise DataError(self._damaged[0] + others)

    def _answer(self, schedule: Schedule) -> tuple[str, Answer] | None:
        """The next shard that is done; None when something else happened, or nothing."""
        limit = self.recipe.cache.shard_timeout_s
        if limit:
            for actor in schedule.overdue(limit):
                if actor not in self._late:
                    self._late.add(actor)
                    self.session.ray.kill(actor)
        call = self.session.wait(self._calls)
        if self.stop:  # also where answers never cease; what has none yet is in the ledger
            raise StopRequested("caching stopped on request; run it again for the other shards")
        if call is None:
            self._tell_idle()
            return None
        actor, name = self._calls.pop(call)
        try:
            answer = self.session.ray.get(call)
        except self.session.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OSError):  # Ray's own type has lost its number
                cause = StorageError.of(cause)
            if not isinstance(cause, DpalError):
                raise
            self._fail(schedule, actor, name, cause)
            return None
        except self.session.deaths as error:
            self._replace(schedule, actor, error)
            return None
        if not name:
            self._ready.add(actor)
            self._failures, self._patience_s = 0, PATIENCE_S
        elif schedule.finished(actor, name):
            return name, answer
        return None

    def _fail(self, schedule: Schedule, actor: Any, name: str, error: DpalError) -> None:
        """Raise what an actor met; but a damaged shard waits until the others are done."""
        if name and isinstance(error, DataError) and len(self._damaged) < RETRIES:
            if schedule.finished(actor, name):
                self._damaged.append(str(error))
                say(f"cache: {error}; going on with the others")
            return
        first = self._damaged[0] if self._damaged else str(error)
        raise type(error)(first if isinstance(error, DataError) else str(error)) from None

    def _tell_smaller(self, size: int) -> None:
        """Say once that batches became smaller."""
        wanted = self.recipe.teacher.batch_size
        if size < wanted and not self._told:
            self._told = True
            say(
                f"cache: teacher.batch_size={wanted} does not fit into the device's memory; "
                f"going on with {size}"
            )

    def _tell_idle(self) -> None:
        """Say why nothing goes on while no actor is ready, more and more seldom."""
        now = time.monotonic()
        if self._ready:
            self._idle_since = now
        elif now - self._idle_since > self._patience_s:
            self._patience_s *= 2
            cache = self.recipe.cache
            say(
                f"cache: no teacher is ready after {now - self._idle_since:.0f} s; "
                + (
                    "it is being loaded, or waits for a free node"
                    if self.session.has_room(cache.cpus_per_actor, cache.gpus_per_actor)
                    else f"no node of Ray has what an actor asks for, {cache.cpus_per_actor:g} "
                    f"CPUs and {cache.gpus_per_actor:g} GPUs, so one is waited for"
                )
            )

    def _replace(self, schedule: Schedule, actor: Any, error: Any) -> None:
        """Another actor for one that died. Raises DataError when that has no end."""
        self._calls = {call: it for call, it in self._calls.items() if it[0] != actor}
        self.session.require_head()
        self.session.ray.kill(actor)  # one that was out of reach may live, and keep its device
        preempted = getattr(error, "preempted", False)
        late = actor in self._late
        why = "was too late" if late else "lost its machine" if preempted else "died"
        say(f"cache: a teacher actor {why}; another one takes its place")
        if actor in self._ready:
            limit = self.recipe.cache.shard_timeout_s
            too_long = f"took longer than cache.shard_timeout_s={limit:g} {RETRIES + 1} times"
            schedule.lose(actor, too_long if late else DIED, blame=not preempted)
            self._ready.discard(actor)
            self._late.discard(actor)
            self._idle_since = time.monotonic()
        elif not preempted:
            self._failures += 1
            if self._failures > RETRIES:
                raise DataError(f"loading the teacher and the calibration {DIED}") from None
        self.hire()
