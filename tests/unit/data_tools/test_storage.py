"""Stores on a folder and in memory keep the same promises; errors are one sentence."""

import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from data_tools.direct_get import DirectGet, StoreAnswer
from data_tools.failures import scrub
from data_tools.remote import LONGEST_DELAY_S, RETRIES_AT_ONCE, RemoteStore
from data_tools.storage import LocalStore, ObjectStore, open_store
from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.base.inputs import Storage
from dpal.base.telemetry import STORAGE_RETRIES, MemoryTelemetry

MakeStore = Callable[[str], ObjectStore]


@pytest.fixture(params=["folder", "file-url", "memory"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    base = {
        "folder": str(tmp_path / "s p"),
        "file-url": f"file://{tmp_path}/s%20p",
        "memory": f"memory://{tmp_path.name}",
    }[request.param]
    return lambda name: open_store(f"{base}/{name}", Storage())


def test_objects_come_back_whole_and_in_ranges(make_store: MakeStore) -> None:
    store = make_store("x")
    assert store.list() == []
    store.put("a/b", b"0123456789")
    store.put("a/b", b"abcdef")
    store.put("c", b"")
    assert store.list() == ["a/b", "c"]
    assert store.list("a/") == store.list("a") == ["a/b"]
    assert store.list("nothing/") == []
    assert store.get("a/b") == b"abcdef"
    assert store.get_range("a/b", 2, 3) == b"cde"
    assert (store.size("a/b"), store.size("c")) == (6, 0)
    assert store.exists("c")
    assert not store.exists("a")
    store.delete("c")
    store.delete("c")
    assert store.list() == ["a/b"]


def test_missing_objects_are_data_errors(make_store: MakeStore) -> None:
    store = make_store("x")
    for call in (store.get, store.size, lambda name: store.get_range(name, 0, 1)):
        with pytest.raises(DataError, match="gone' does not exist"):
            call("gone")


def test_a_range_beyond_the_end_is_a_data_error(make_store: MakeStore) -> None:
    store = make_store("x")
    store.put("a", b"123")
    with pytest.raises(DataError, match="ends before byte 5"):
        store.get_range("a", 1, 4)


def test_conditional_write_has_exactly_one_winner(make_store: MakeStore) -> None:
    store = make_store("x")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_if_absent("lock", b"%d" % i), range(16)))
    assert won.count(True) == 1
    assert store.get("lock") == b"%d" % won.index(True)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_names_that_leave_the_store_are_refused(make_store: MakeStore, name: str) -> None:
    store = make_store("x")
    for call in (store.get, store.delete, lambda name: store.put(name, b"1")):
        with pytest.raises(DataError, match="plain relative name"):
            call(name)


def test_a_url_with_credentials_is_refused_without_telling_them() -> None:
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        open_store("s3://AKIAKEY:hunter2@bucket/x", Storage())
    assert "hunter2" not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'nosuch'"):
        open_store("nosuch://x", Storage())


def test_no_write_leaves_anything_behind_when_a_file_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the write fail half-way, as a full disk does."""
    store = LocalStore(tmp_path)
    store.put("old", b"old")
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.put("old", b"x" * 5000)
        except StorageError as error:
            os._exit(0 if "no space left" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert store.get("old") == b"old"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_storage_error_and_nothing_partial_stays(tiny_disk: Path) -> None:
    store = LocalStore(tiny_disk)
    store.put("fits", b"x" * 100_000)
    with pytest.raises(StorageError, match="no space left") as caught:
        store.put("large", b"x" * 400_000)
    assert caught.value.exit_code == 4
    assert [path.name for path in tiny_disk.iterdir()] == ["fits"]


def test_a_killed_writer_leaves_no_object_and_its_rest_is_swept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    child = os.fork()
    if child == 0:
        with store._aside("a", b"123"):
            os._exit(0)  # dies between the write and the rename
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert store.list() == []
    assert store.listing() == ()
    with store._aside("b", b"4"):
        store.sweep()
        assert len(list(tmp_path.iterdir())) == 1  # a living writer's file is left alone


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        LocalStore(tmp_path / "file").put("a", b"1")


class Failing:
    """A file system whose reads fail with the given errors, one after the other."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    def cat_file(self, _path: str) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return b"ok"


def failing_store(errors: list[Exception], telemetry: MemoryTelemetry, waits: list[float]):
    storage = Storage(key="my-key", secret="my-secret", retries=3)
    store = RemoteStore("memory://x", storage, telemetry=telemetry, sleep=waits.append)
    store._fs, store._pid = Failing(errors), os.getpid()
    return store


@pytest.mark.parametrize(
    "error",
    [TimeoutError("slow"), ConnectionResetError("reset"), OSError(16, "busy"), OSError(121, "io")],
)
def test_passing_failures_are_retried_after_waits_drawn_from_growing_ranges(
    error: Exception,
) -> None:
    drawn = []
    for _store in range(60):
        telemetry, waits = MemoryTelemetry(), []
        assert failing_store([error] * 3, telemetry, waits).get("a") == b"ok"
        assert telemetry.values[STORAGE_RETRIES.name,] == 3
        drawn.append(waits)
    for longest, waits in zip((0.4, 0.8, 1.6), zip(*drawn, strict=True), strict=True):
        assert 0 <= min(waits) < longest / 4, "full jitter: some ask again soon"
        assert 3 / 4 * longest < max(waits) <= longest


def test_after_a_fork_no_thread_is_given_the_connections_of_the_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("s3fs")
    begun, go_on, pid = threading.Event(), threading.Event(), os.getpid()
    store = RemoteStore("s3://bucket/x", Storage())
    store._filesystem()
    inherited = store._direct

    class Slow(DirectGet):
        def __init__(self, *args: Any) -> None:
            begun.set()
            go_on.wait(10)
            super().__init__(*args)

    monkeypatch.setattr("data_tools.remote.DirectGet", Slow)
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store._filesystem)
        assert begun.wait(10)
        second = pool.submit(lambda: (store._filesystem(), store._direct))
        done, _waiting = wait([second], timeout=0.5)
        go_on.set()
        assert not done
        assert second.result()[1] is not inherited
        assert first.result() is not None


def refusal(status: int, **headers: str) -> Exception:
    return StoreAnswer(status, "SlowDown", headers)


def test_a_store_that_names_a_wait_is_given_it() -> None:
    waits: list[float] = []
    failing_store([refusal(503, **{"Retry-After": "7"})], MemoryTelemetry(), waits).get("a")
    assert 7 <= waits[0] <= 7.4
    failing_store([refusal(429, **{"retry-after": "9999"})], MemoryTelemetry(), waits).get("a")
    assert waits[1] == LONGEST_DELAY_S, "bounded"
    failing_store([refusal(503, **{"Retry-After": "next year"})], MemoryTelemetry(), waits).get("a")
    assert waits[2] <= 0.4


def test_many_threads_do_not_ask_again_all_at_once() -> None:
    """64 threads meet a store that fails: few of them ask again at any one time."""
    lock, asking, most = threading.Lock(), 0, 0
    failed: set[int] = set()

    class Busy:
        def cat_file(self, _path: str) -> bytes:
            nonlocal asking, most
            if threading.get_ident() not in failed:
                failed.add(threading.get_ident())
                barrier.wait()
                raise refusal(503)
            with lock:
                asking += 1
                most = max(most, asking)
            time.sleep(0.005)
            with lock:
                asking -= 1
            return b"ok"

    barrier = threading.Barrier(64)
    store = RemoteStore("memory://x", Storage(retries=3), sleep=lambda _seconds: None)
    store._fs, store._pid = Busy(), os.getpid()
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _i: store.get("a"), range(64))) == {b"ok"}
    assert 2 <= most <= RETRIES_AT_ONCE


def test_a_failure_that_stays_is_a_storage_error_without_secrets() -> None:
    text = "http://u:pw@host answered my-key with my-secret"
    store = failing_store([TimeoutError(text)] * 9, MemoryTelemetry(), [])
    with pytest.raises(StorageError, match="after 4 attempts") as caught:
        store.get("a")
    assert caught.value.__suppress_context__
    for secret in ("my-key", "my-secret", "pw"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError("my-secret"), OSError(22, "my-secret bad")])
def test_refusals_are_not_retried_and_tell_no_secret(error: Exception) -> None:
    waits: list[float] = []
    with pytest.raises(StorageError) as caught:
        failing_store([error], MemoryTelemetry(), waits).get("a")
    assert waits == []
    assert "my-secret" not in str(caught.value)


def test_scrub_removes_the_signature_of_a_url() -> None:
    url = "http://host/b/k?X-Amz-Credential=me%2F2026&X-Amz-Signature=abc123 timed out"
    told = scrub(url)
    assert "abc123" not in told
    assert "me%2F" not in told
    assert told.endswith("timed out")


def test_scrub_removes_credentials_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "from-environment")
    assert scrub("x from-environment y", "") == "x *** y"
