"""The S3 store against a real server: promises, wrong credentials, a server that goes away."""

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_tools.storage import open_store
from dpal.base.errors import DataError, StorageError
from dpal.base.inputs import Storage
from dpal.base.telemetry import STORAGE_RETRIES, MemoryTelemetry

from seaweed import KEY, SECRET, S3Server, kill_s3, start_s3


def test_objects_come_back_and_names_are_sorted(s3_server: S3Server) -> None:
    store = open_store(s3_server.url(), s3_server.storage())
    assert store.list() == []
    for name in ("b", "a/2", "a/1"):
        store.put(name, name.encode() * 3)
    assert store.list() == ["a/1", "a/2", "b"]
    assert store.list("a/") == ["a/1", "a/2"]
    assert store.get("a/2") == b"a/2a/2a/2"
    assert store.get_range("a/2", 2, 4) == b"2a/2"
    assert store.size("b") == 3
    assert store.exists("b")
    assert not store.exists("a")
    store.delete("b")
    store.delete("b")
    assert not store.exists("b")


def test_range_beyond_the_end_is_refused(s3_server: S3Server) -> None:
    store = open_store(s3_server.url(), s3_server.storage())
    store.put("x", b"12345")
    with pytest.raises(DataError, match="ends before byte 9"):
        store.get_range("x", 3, 6)


def test_conditional_write_has_exactly_one_winner(s3_server: S3Server) -> None:
    store = open_store(s3_server.url(), s3_server.storage())
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_if_absent("lock", b"%d" % i), range(8)))
    assert won.count(True) == 1
    assert store.get("lock") == b"%d" % won.index(True)


def test_missing_object_is_a_data_error_and_missing_bucket_a_storage_error(
    s3_server: S3Server,
) -> None:
    store = open_store(s3_server.url(), s3_server.storage())
    with pytest.raises(DataError, match=r"/nothing' does not exist"):
        store.get("nothing")
    with pytest.raises(DataError, match=r"/nothing' does not exist"):
        store.size("nothing")
    elsewhere = open_store("s3://no-such-bucket/x", s3_server.storage())
    with pytest.raises(StorageError, match="bucket"):
        elsewhere.get("a")
    with pytest.raises(StorageError, match="bucket"):
        elsewhere.list()


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials_fail_at_once_and_are_never_told(s3_server: S3Server, wrong: str) -> None:
    credentials = {"key": KEY, "secret": SECRET, wrong: "hunter2-wrong-value"}
    telemetry = MemoryTelemetry()
    storage = s3_server.storage(**credentials, retries=5)
    store = open_store(s3_server.url(), storage, telemetry=telemetry)
    for call in (
        lambda: store.put("x", b"1"),
        lambda: store.get("x"),
        lambda: store.list(),
        lambda: store.exists("x"),
    ):
        with pytest.raises(StorageError, match="refuses these credentials") as caught:
            call()
        assert caught.value.exit_code == 4
        for secret in credentials.values():
            assert secret not in str(caught.value)
    assert telemetry.values == {}  # not one retry


def test_the_standard_variables_reach_the_store(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_server.url()
    endpoint = s3_server.endpoint.replace("127.0.0.1", "localhost")  # a host name, not an address
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    open_store(url, Storage()).put("x", b"by variables")
    assert open_store(url, s3_server.storage()).get("x") == b"by variables"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-wrong-value")
    with pytest.raises(StorageError, match="refuses these credentials"):
        open_store(url, Storage()).get("x")


def test_store_works_after_a_fork_and_after_pickling(s3_server: S3Server) -> None:
    store = open_store(s3_server.url(), s3_server.storage())
    store.put("x", b"parent")
    again = pickle.loads(pickle.dumps(store))
    assert again.get("x") == b"parent"
    child = os.fork()
    if child == 0:
        try:
            store.put("y", b"child:" + store.get("x"))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    asked = time.monotonic()
    assert store.get("y") == b"child:parent"
    assert time.monotonic() - asked < 5  # the parent's connections were left alone


def test_requests_outlast_a_server_that_is_down_for_a_moment(tmp_path: Path) -> None:
    server, process = start_s3(tmp_path)
    kill_s3(process)
    telemetry = MemoryTelemetry()
    store = open_store(server.url(), server.storage(retries=2, timeout_s=2), telemetry=telemetry)
    with pytest.raises(StorageError, match="after 3 attempts"):
        store.put("x", b"1")
    assert telemetry.values[STORAGE_RETRIES.name,] == 2


class _Flaky:
    """A TCP server that answers 503 twice, then cuts a body short, then serves it whole."""

    BODY = b"0123456789"

    def __init__(self) -> None:
        import http.server

        answers = iter(["busy", "busy", "cut"])

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer = next(answers, "whole")
                body = b"" if answer == "busy" else _Flaky.BODY
                self.send_response(503 if answer == "busy" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:4] if answer == "cut" else body)
                self.close_connection = True

            def log_message(self, *_args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_busy_answers_and_truncated_bodies_are_retried() -> None:
    flaky = _Flaky()
    telemetry = MemoryTelemetry()
    server = S3Server(f"http://127.0.0.1:{flaky.server.server_port}", "bucket")
    store = open_store("s3://bucket/p", server.storage(retries=3), telemetry=telemetry)
    try:
        assert store.get("x") == _Flaky.BODY
    finally:
        flaky.server.shutdown()
        flaky.server.server_close()
    assert telemetry.values[STORAGE_RETRIES.name,] == 3
