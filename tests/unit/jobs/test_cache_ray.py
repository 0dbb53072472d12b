"""What the driver makes of a stop request, a dead actor, and an error told by an actor."""

import signal
from types import SimpleNamespace

import pytest

from dpal.base.errors import DataError, StopRequested
from dpal.base.signals import StopSignal
from jobs.cache_ray import _result, _wait


def answering(error: Exception) -> SimpleNamespace:
    """Ray's own exception types, with a `get` that raises `error`."""
    ray = pytest.importorskip("ray")

    def get(_call: object) -> None:
        raise error

    return SimpleNamespace(get=get, exceptions=ray.exceptions)


def test_a_stop_request_ends_the_wait_with_run_me_again() -> None:
    never = SimpleNamespace(wait=lambda calls, num_returns, timeout: ([], calls))
    stop = StopSignal()
    stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="run it again"):
        _wait(never, {"call": None}, stop)


def test_a_call_that_is_done_counts_before_a_stop_request() -> None:
    done = SimpleNamespace(wait=lambda calls, num_returns, timeout: (calls[:1], calls[1:]))
    stop = StopSignal()
    stop.received = signal.SIGTERM
    assert _wait(done, {"call": None}, stop) == "call"


def test_signal_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal.listening() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


def test_a_shard_that_keeps_killing_its_actor_is_named() -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    for error in (exceptions.ActorDiedError(), exceptions.OutOfMemoryError("memory")):
        with pytest.raises(DataError, match=r"shard 'p-3.tar' ended its teacher actor 4 times"):
            _result(answering(error), "call", "shard 'p-3.tar'")


def test_an_actors_error_reaches_the_user_as_its_one_sentence() -> None:
    exceptions = pytest.importorskip("ray.exceptions")
    told = DataError("shard 'p-3.tar' is damaged")
    wrapped = exceptions.RayTaskError("cache_shard", "Traceback ...", told).as_instanceof_cause()
    with pytest.raises(DataError) as caught:
        _result(answering(wrapped), "call", "shard 'p-3.tar'")
    assert type(caught.value) is DataError
    assert str(caught.value) == "shard 'p-3.tar' is damaged"
