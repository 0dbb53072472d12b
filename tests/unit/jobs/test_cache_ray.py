"""What the driver makes of a stop request, a dead actor, a lost head, and an actor's error."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_tools.manifest import ShardRef
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError, StopRequested, StorageError
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal
from jobs.caching import ray_job
from jobs.caching import session as cache_session
from jobs.caching.ray_job import Answer, Crew, cache_shards
from jobs.caching.schedule import RETRIES, Schedule
from jobs.caching.session import STARTS, Session, open_session

Behave = Callable[[int, str], Exception | int]


class FakeRay:
    """Ray's own exception types; an actor answers at once what `behave(actor, shard)` says.

    `None` as a shard is `prepare`. An answer of -1 never comes.
    """

    def __init__(self, behave: Behave, address: str = "") -> None:
        ray = pytest.importorskip("ray")
        self.exceptions, self.behave = ray.exceptions, behave
        self.util = SimpleNamespace(
            client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: not address))
        )
        self.address, self.hired, self.killed = address, 0, set()
        self.answers: dict[object, tuple[int, Exception | int]] = {}

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address=self.address)

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, _class: type) -> SimpleNamespace:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._hire))

    def _hire(self, _recipe: Recipe) -> SimpleNamespace:
        self.hired += 1
        number = self.hired

        def call(ref: ShardRef | None = None) -> object:
            handle = object()
            self.answers[handle] = number, self.behave(number, ref.name if ref else "")
            return handle

        method = SimpleNamespace(remote=call)
        return Actor(number, method)

    def kill(self, actor: "Actor") -> None:
        self.killed.add(actor.number)

    def wait(self, calls: list, num_returns: int, timeout: float) -> tuple[list, list]:
        for call in calls:
            actor, answer = self.answers[call]
            if answer != -1 or actor in self.killed:
                return [call], []
        return [], calls

    def get(self, call: object) -> Answer:
        actor, answer = self.answers[call]
        if actor in self.killed:
            raise self.exceptions.ActorDiedError()
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer, 32)


class Actor:
    def __init__(self, number: int, method: SimpleNamespace) -> None:
        self.number, self.prepare, self.cache_shard = number, method, method


def shards(count: int) -> list[ShardRef]:
    return [ShardRef(f"p-{i}.tar", "0" * 64, 1, 1, "") for i in range(count)]


def recipe_of(**cache) -> Recipe:
    return resolve_recipe(
        {
            "name": "crew",
            "data": {"images": ["synthetic"]},
            "teacher": {"kind": "taught"},
            "student": {},
            "cache": cache,
            "train": {"duration": "1 steps", "warmup": "0 steps"},
        }
    )


def crew_of(behave: Behave, **cache) -> Crew:
    return Crew(Session(FakeRay(behave)), recipe_of(**cache), StopSignal())


def run(crew: Crew, count: int) -> list[str]:
    crew.hire()
    crew.await_first()
    return sorted(ref.name for ref, _views in crew.work(shards(count)))


def test_every_shard_is_yielded_once_by_any_number_of_actors() -> None:
    for actors in (1, 2, 5):
        crew = crew_of(lambda _actor, _shard: 1, actors=actors)
        assert run(crew, 7) == [f"p-{i}.tar" for i in range(7)]
        assert crew.session.ray.hired == actors


def test_a_dead_actor_is_replaced_and_its_shards_are_done_again() -> None:
    errors = pytest.importorskip("ray.exceptions")
    dead = errors.ActorDiedError()
    crew = crew_of(lambda actor, shard: dead if shard and actor < 3 else 1, actors=1)
    assert run(crew, 4) == [f"p-{i}.tar" for i in range(4)]
    assert crew.session.ray.hired == 3


def test_an_actor_that_is_out_of_reach_does_not_keep_its_device() -> None:
    errors = pytest.importorskip("ray.exceptions")
    away = errors.ActorUnavailableError("the network", None)
    crew = crew_of(lambda actor, shard: away if shard and actor == 1 else 1, actors=1)
    assert run(crew, 4) == [f"p-{i}.tar" for i in range(4)]
    assert crew.session.ray.killed == {1}


def test_a_shard_that_keeps_killing_its_actor_is_named() -> None:
    errors = pytest.importorskip("ray.exceptions")
    dead = errors.ActorDiedError()
    crew = crew_of(lambda _actor, shard: dead if shard == "p-3.tar" else 1, actors=2)
    sentence = rf"shard 'p-3.tar' ended its teacher actor {RETRIES + 1} times"
    with pytest.raises(DataError, match=sentence):
        run(crew, 6)


def test_a_death_and_a_damaged_shard_are_told_when_they_happen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    errors = pytest.importorskip("ray.exceptions")
    told = DataError("shard 'p-2.tar' is damaged")
    wrapped = errors.RayTaskError("cache_shard", "Traceback ...", told).as_instanceof_cause()
    dead = errors.ActorDiedError()
    crew = crew_of(
        lambda actor, shard: dead if shard and actor == 1 else wrapped if shard == "p-2.tar" else 1,
        actors=1,
    )
    crew.hire()
    crew.await_first()
    seen: list[str] = []
    with pytest.raises(DataError):
        seen.extend(capsys.readouterr().err for _ in crew.work(shards(3)))
    lines = ("".join(seen) + capsys.readouterr().err).splitlines()
    assert lines.count("cache: a teacher actor died; another one takes its place") == 1
    assert lines.count("cache: shard 'p-2.tar' is damaged; going on with the others") == 1
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("cpus", "why"), [(1.0, "being loaded"), (64.0, "no node of Ray has .*64 CPUs and 0 GPUs")]
)
def test_waiting_for_a_teacher_says_what_for_and_more_and_more_seldom(
    cpus: float, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(ray_job.time, "monotonic", lambda: now[0])
    crew = crew_of(lambda _actor, _shard: -1, cpus_per_actor=cpus)
    crew.hire()
    schedule = Schedule((), lambda: 0.0)
    for second in range(200):
        now[0] = float(second)
        assert crew._answer(schedule) is None
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"after (\d+) s", line)[1]) for line in lines] == [31, 61, 121]
    assert all(re.search(why, line) for line in lines)


def test_the_first_teacher_is_told_before_the_first_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def session(_recipe: Recipe, _stopped: object) -> Iterator[Session]:
        yield Session(FakeRay(lambda _actor, _shard: 1))

    monkeypatch.setattr(ray_job, "open_session", session)
    events: list[str] = []
    for ref, _views in cache_shards(recipe_of(), shards(2), lambda: events.append("ready")):
        events.append(ref.name)
    assert events[0] == "ready"
    assert len(events) == 3


def test_a_teacher_that_cannot_be_loaded_ends_the_job() -> None:
    errors = pytest.importorskip("ray.exceptions")
    for dead in (errors.ActorDiedError(), errors.OutOfMemoryError("memory")):
        crew = crew_of(lambda _actor, _shard, dead=dead: dead, actors=2)
        with pytest.raises(DataError, match="loading the teacher"):
            run(crew, 6)
        assert crew.session.ray.hired == RETRIES + 1


def test_a_shard_beyond_its_deadline_is_done_again_by_another_actor() -> None:
    crew = crew_of(
        lambda actor, shard: -1 if actor == 1 and shard else 1, actors=1, shard_timeout_s=0.01
    )
    assert run(crew, 3) == [f"p-{i}.tar" for i in range(3)]
    assert crew.session.ray.killed == {1}


def test_a_shard_that_is_always_late_is_named_with_its_key() -> None:
    crew = crew_of(
        lambda _actor, shard: -1 if shard == "p-1.tar" else 1, actors=1, shard_timeout_s=0.01
    )
    with pytest.raises(DataError, match=r"shard 'p-1.tar' took longer than cache.shard_timeout_s"):
        run(crew, 3)


def test_an_actors_error_reaches_the_user_as_its_one_sentence() -> None:
    errors = pytest.importorskip("ray.exceptions")
    told = DataError("shard 'p-2.tar' is damaged")
    wrapped = errors.RayTaskError("cache_shard", "Traceback ...", told).as_instanceof_cause()
    crew = crew_of(lambda _actor, shard: wrapped if shard == "p-2.tar" else 1, actors=1)
    with pytest.raises(DataError) as caught:
        run(crew, 4)
    assert type(caught.value) is DataError
    assert str(caught.value) == "shard 'p-2.tar' is damaged"


def test_what_an_actors_file_system_said_is_a_sentence() -> None:
    errors = pytest.importorskip("ray.exceptions")
    full = OSError(errno.ENOSPC, "No space left on device", "/scratch/x")
    wrapped = errors.RayTaskError("cache_shard", "Traceback ...", full).as_instanceof_cause()
    crew = crew_of(lambda _actor, shard: wrapped if shard else 1, actors=1)
    with pytest.raises(StorageError, match=r"^cannot use '/scratch/x': No space left on device$"):
        run(crew, 2)


def test_a_damaged_shard_does_not_keep_the_others_from_being_done() -> None:
    errors = pytest.importorskip("ray.exceptions")

    def behave(_actor: int, shard: str) -> Exception | int:
        if shard not in ("p-2.tar", "p-5.tar"):
            return 1
        told = DataError(f"shard {shard!r} is damaged")
        return errors.RayTaskError("cache_shard", "Traceback ...", told).as_instanceof_cause()

    crew, done = crew_of(behave, actors=2), []

    def work() -> None:
        crew.hire()
        crew.await_first()
        for ref, _views in crew.work(shards(9)):
            done.append(ref.name)

    with pytest.raises(DataError, match=r"^shard 'p-[25].tar' is damaged; 1 more shard failed$"):
        work()
    assert sorted(done) == [f"p-{i}.tar" for i in range(9) if i not in (2, 5)]


def test_when_everything_is_damaged_the_job_does_not_read_it_all() -> None:
    errors = pytest.importorskip("ray.exceptions")
    asked: list[str] = []

    def behave(_actor: int, shard: str) -> Exception | int:
        if not shard:
            return 1
        asked.append(shard)
        told = DataError(f"shard {shard!r} is damaged")
        return errors.RayTaskError("cache_shard", "Traceback ...", told).as_instanceof_cause()

    with pytest.raises(DataError, match="is damaged"):
        run(crew_of(behave, actors=1), 100)
    assert len(asked) < 10


def test_a_stop_request_ends_the_wait_with_run_me_again() -> None:
    crew = crew_of(lambda _actor, shard: -1 if shard else 1, actors=1)
    crew.hire()
    crew.await_first()
    crew.stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="run it again"):
        list(crew.work(shards(2)))


def test_a_stop_request_is_noticed_while_answers_never_cease() -> None:
    crew, done = crew_of(lambda _actor, _shard: 1, actors=2), []
    crew.hire()
    crew.await_first()

    def work() -> None:
        for ref, _views in crew.work(shards(50)):
            done.append(ref.name)
            crew.stop.received = signal.SIGTERM

    with pytest.raises(StopRequested, match="run it again"):
        work()
    assert len(done) == 1


def test_a_head_that_is_gone_for_good_ends_the_job_with_run_me_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_session, "LOOK_S", 0.0)
    monkeypatch.setattr(cache_session, "HEAD_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = "{}:{}".format(*head.getsockname())
        session = Session(FakeRay(lambda _actor, _shard: -1, address))
        assert session.wait([]) is None
        session.require_head()
    with pytest.raises(StopRequested, match=r"Ray is gone .* again"):
        session.wait([])
    assert session.lost
    with pytest.raises(StopRequested, match="Ray is gone"):
        session.require_head()


def opened(cache: str, folder: Path, **env: str) -> str:
    """What a new process without a home says that opens a session of `cache`."""
    pytest.importorskip("ray")
    code = (
        "from types import SimpleNamespace as Plain\n"
        "from dpal.base.errors import ConfigError\n"
        "from jobs.caching.session import open_session\n"
        "try:\n"
        f"    with open_session(Plain(cache=Plain({cache}))):\n"
        "        pass\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HOME": str(folder), **env},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return done.stdout


def test_a_cluster_token_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    told = opened("ray_address='127.0.0.1:9'", tmp_path, RAY_AUTH_MODE="token")
    assert told.startswith("cache.ray_address='127.0.0.1:9': no Ray cluster answers (Token")


def test_sockets_that_linux_does_not_take_are_told_in_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    cache = "ray_address='local', actors=1, cpus_per_actor=1"
    told = opened(cache, tmp_path, RAY_TMPDIR=str(folder))
    assert told.startswith("cache.ray_address='local': Ray does not start here (")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """Ray's module, whose start is what the test appends."""
    ray, events = pytest.importorskip("ray"), []
    monkeypatch.setattr(ray, "init", lambda **_: [event() for event in events])
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(cache_session, "_address", lambda _ray: None)
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    yield events
    signal.signal(signal.SIGTERM, before)
    os.environ.clear()
    os.environ.update(environment)


def test_ray_of_this_job_alone_has_a_token_of_its_own_and_writes_none(
    started: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    started.append(lambda: told.append(os.environ.get("RAY_AUTH_TOKEN")))
    for theirs in ("", "", "their own"):
        for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", theirs)):
            monkeypatch.setenv(name, value) if theirs else monkeypatch.delenv(name, raising=False)
        with open_session(recipe_of()):
            pass
    assert len(set(told)) == 3
    assert min(map(len, told[:2])) == 64
    assert told[2] == "their own"


def test_ray_does_not_take_the_stop_signal(started: list[Callable[[], None]]) -> None:
    started.append(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    with StopSignal.listening() as stop, open_session(recipe_of()):
        signal.raise_signal(signal.SIGTERM)
        assert stop


def test_a_stop_request_while_ray_starts_is_run_me_again(
    started: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session
    monkeypatch.setattr(
        cache_session, "Session", lambda _ray: session(FakeRay(lambda _actor, _shard: 1))
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else this very process would end
    started.append(lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StopRequested, match="run it again"):
        list(cache_shards(recipe_of(), shards(2)))


def late() -> None:
    raise Exception("The current node timed out during startup.")  # as Ray does


def test_a_start_that_takes_too_long_every_time_is_run_me_again(
    started: list[Callable[[], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    started.append(late)
    with pytest.raises(StopRequested, match=r"not start \(The .* during startup\.\); run .* again"):
        list(cache_shards(recipe_of(), shards(1)))
    assert capsys.readouterr().err.count("trying again") == STARTS - 1


def test_a_start_that_took_too_long_is_tried_again(started: list[Callable[[], None]]) -> None:
    tries: list[int] = []

    def late_at_first() -> None:
        tries.append(len(tries))
        if len(tries) < STARTS:
            late()

    started.append(late_at_first)
    with open_session(recipe_of()):
        assert len(tries) == STARTS


def test_after_a_stop_request_ray_is_not_started_again(
    started: list[Callable[[], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else this very process would end
    started += [lambda: signal.raise_signal(signal.SIGTERM), late]
    with pytest.raises(StopRequested, match="did not start"):
        list(cache_shards(recipe_of(), shards(1)))
    assert "trying again" not in capsys.readouterr().err


def test_a_long_temporary_folder_of_a_scheduler_does_not_keep_ray_from_starting(
    started: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    started.append(lambda: told.append(os.environ.get("RAY_TMPDIR")))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder in ("/scratch", "/scratch/" + "long" * 10):
        monkeypatch.setenv("TMPDIR", folder)
        with open_session(recipe_of()):
            pass
    assert told == [None, "/tmp"]


def test_signal_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal.listening() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


def test_a_batch_that_became_smaller_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    crew = crew_of(lambda _actor, _shard: 1, actors=2)  # its answers say 32, the recipe 64
    crew.recipe = crew.recipe.model_copy(
        update={"teacher": crew.recipe.teacher.model_copy(update={"batch_size": 64})}
    )
    assert run(crew, 5) == [f"p-{i}.tar" for i in range(5)]
    assert capsys.readouterr().err.count("teacher.batch_size=64 does not fit") == 1
