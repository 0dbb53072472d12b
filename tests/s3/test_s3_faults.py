"""Each fault of a store alone: what is asked again, what is refused, and what it costs."""

import os
import time
from collections.abc import Callable

import pytest

from data_tools.storage import ObjectStore, open_store
from data_tools.verified import Content, fetch_verified
from dpal.base.errors import DataError, DpalError, StorageError
from dpal.base.telemetry import STORAGE_REFETCHES, STORAGE_RETRIES, MemoryTelemetry

from fault_proxy import Fault, FaultProxy, Schedule
from seaweed import S3Server

BODY = os.urandom(200_000)
LARGE = os.urandom(9_000_000)


@pytest.fixture
def telemetry() -> MemoryTelemetry:
    return MemoryTelemetry()


@pytest.fixture
def store(s3_server: S3Server, faulty_server: S3Server, telemetry: MemoryTelemetry) -> ObjectStore:
    """A prefix with one object, reached through the proxy: quick to give up, slow to despair."""
    url = s3_server.url()
    open_store(url, s3_server.storage()).put("x", BODY)
    storage = faulty_server.storage(timeout_s=0.5, retries=3, min_mb_per_s=1.0)
    return open_store(url, storage, telemetry=telemetry)


def first(*faults: Fault) -> Schedule:
    """Spoil the first requests, and no other."""
    return lambda number, _method, _path: faults[number] if number < len(faults) else Fault()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("500"),
        Fault("503"),
        Fault("503", seconds=1),
        Fault("truncate", 0.0),
        Fault("truncate", 0.6),
        Fault("stall", 0.0, seconds=5),
        Fault("stall", 0.6, seconds=5),
        Fault("trickle", seconds=0.01),
        Fault("reset before"),
        Fault("reset after"),
        Fault("delay", seconds=5),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.amount}-{fault.seconds}",
)
def test_a_fault_that_passes_costs_one_more_request(
    fault: Fault, store: ObjectStore, proxy: FaultProxy, telemetry: MemoryTelemetry
) -> None:
    proxy.set(first(fault))
    began = time.monotonic()
    assert store.get("x") == BODY
    took = time.monotonic() - began
    assert [request.fault.kind for request in proxy.requests] == [fault.kind, "none"]
    assert telemetry.values == {(STORAGE_RETRIES.name,): 1}
    assert took < 3, "neither a stalled nor a trickling answer is waited for"
    if fault.kind == "503":
        assert took >= fault.seconds, "as long as the store asked for"


@pytest.mark.parametrize("kind", ["500", "truncate", "reset after", "stall"])
def test_a_range_is_asked_for_again(kind: str, store: ObjectStore, proxy: FaultProxy) -> None:
    fault = Fault(kind, 0.5, seconds=5 if kind == "stall" else 0)
    proxy.set(first(fault, fault))
    assert store.get_range("x", 1000, 50_000) == BODY[1000:51_000]
    assert len(proxy.requests) == 3


@pytest.mark.parametrize("kind", ["500", "503", "reset before", "reset after", "truncate"])
@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
def test_a_write_outlasts_a_fault(
    kind: str, body: bytes, store: ObjectStore, proxy: FaultProxy
) -> None:
    proxy.set(first(Fault(kind)))
    store.put("written", body)
    assert store.get("written") == body
    assert proxy.requests[0].fault.kind == kind


def test_an_object_is_made_by_one_writer_though_the_answer_was_lost(
    store: ObjectStore, proxy: FaultProxy
) -> None:
    proxy.set(first(Fault("reset after")))
    assert store.put_if_absent("lock", b"mine")
    assert not store.put_if_absent("lock", b"theirs")
    assert store.get("lock") == b"mine"


def test_listings_and_sizes_outlast_faults(store: ObjectStore, proxy: FaultProxy) -> None:
    proxy.set(first(Fault("503"), Fault("reset before")))
    assert store.list() == ["x"]
    proxy.set(first(Fault("500"), Fault("reset before")))
    assert store.size("x") == len(BODY)
    proxy.set(first(Fault("503")))
    assert store.exists("x")


def test_a_fault_that_stays_is_told_after_a_bounded_number_of_requests(
    store: ObjectStore, proxy: FaultProxy
) -> None:
    proxy.set(lambda _number, _method, _path: Fault("503"))
    with pytest.raises(StorageError, match="after 4 attempts: the store answered 503 SlowDown"):
        store.get("x")
    assert len(proxy.requests) == 4


def flip(*numbers: int) -> Schedule:
    """Flip a bit of the answers to these requests."""
    return lambda number, _method, _path: Fault("flip") if number in numbers else Fault()


def test_a_flipped_bit_is_fetched_again_once_and_counted(
    store: ObjectStore, proxy: FaultProxy, telemetry: MemoryTelemetry
) -> None:
    content, damaged = Content.of(BODY), DataError("object 'x' is damaged")

    def fetch() -> bytes:
        return fetch_verified(lambda: store.get("x"), content, damaged, telemetry)

    proxy.set(flip())
    assert fetch() == BODY
    assert (len(proxy.requests), telemetry.values) == (1, {})
    proxy.set(flip(0))
    assert fetch() == BODY
    assert len(proxy.requests) == 2
    assert telemetry.values == {(STORAGE_REFETCHES.name,): 1}
    proxy.set(flip(0, 1))
    with pytest.raises(DataError, match="'x' is damaged"):
        fetch()
    assert len(proxy.requests) == 2, "and not once more"


def missing_bucket(server: S3Server) -> ObjectStore:
    return open_store("s3://no-such-bucket/p", server.storage(retries=5))


def wrong_secret(server: S3Server) -> ObjectStore:
    return open_store(server.url(), server.storage(secret="hunter2-wrong-value", retries=5))


def wrong_key(server: S3Server) -> ObjectStore:
    return open_store(server.url(), server.storage(key="hunter2-wrong-value", retries=5))


def no_object(server: S3Server) -> ObjectStore:
    return open_store(server.url(), server.storage(retries=5))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (wrong_secret, StorageError, "refuses these credentials"),
        (wrong_key, StorageError, "refuses these credentials"),
        (missing_bucket, StorageError, "the bucket does not exist"),
        (no_object, DataError, "does not exist"),
    ],
    ids=["wrong secret", "wrong key", "missing bucket", "missing object"],
)
def test_what_will_not_pass_is_asked_exactly_once(
    make: Callable[[S3Server], ObjectStore],
    kind: type[DpalError],
    words: str,
    faulty_server: S3Server,
    proxy: FaultProxy,
) -> None:
    proxy.set(first())
    with pytest.raises(kind, match=words) as caught:
        make(faulty_server).get("x")
    assert len(proxy.requests) == 1
    assert "hunter2" not in str(caught.value)
    assert "Signature=" not in str(caught.value)
