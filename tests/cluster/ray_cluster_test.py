"""`dpal submit --on ray` against a real head of this machine, with token authentication."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.ranks import free_port
from data_tools.storage import LocalStore
from dpal.base.errors import ConfigError, StorageError
from jobs import submit
from jobs.caching.worker import ShardWorker

from tiny import tiny_recipe

PATIENCE_S = 300
BIN = Path(sys.executable).parent


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the job server of a Ray head with one CPU; ends with all of its processes."""
    port = free_port()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    folder = Path(tempfile.mkdtemp(prefix="r"))  # Ray's sockets want a short path
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={free_port()}",
        f"--dashboard-port={port}", "--dashboard-host=127.0.0.1", "--num-cpus=1",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}",
        "--object-store-memory=83886080",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(PATIENCE_S):
            assert process.poll() is None, (folder / "log").read_text()
            if _listens(port):
                break
            time.sleep(1)
        yield address
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        print((folder / "log").read_text())  # shown when the test fails
        process.terminate()
        process.wait(60)
        _gone, alive = psutil.wait_procs(children, timeout=10)
        for child in alive:
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def dpal(*words: str | Path) -> str:
    """What the command prints; in a process of its own, as Ray reads its settings at import."""
    command = [sys.executable, "-m", "jobs", *map(str, words)]
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        if "try again later" not in done.stderr:  # a head that has just begun says so
            break
        time.sleep(2)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _await(probe: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not probe():
        assert time.monotonic() < deadline, "patience"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_job_on_a_ray_cluster_makes_the_cache_and_is_found_by_its_id(
    head: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    words = ("submit", path, "--stage", "cache", "--on", "ray")
    assert "submitted ray:tiny-cache-1" in dpal(*words)
    assert "submitted ray:tiny-cache-1" in dpal(*words)  # it lives: nothing starts twice
    job = "ray:tiny-cache-1"
    _await(lambda: "running" not in dpal("status", job) and "pending" not in dpal("status", job))
    printed = dpal("logs", job)
    assert dpal("status", job).startswith(f"{job}: succeeded"), printed
    assert "done: targets-" in printed

    url = tmp_path / "expected"
    cache = recipe.cache.model_copy(update={"url": str(url)})
    alone = ShardWorker(recipe.model_copy(update={"cache": cache}))
    alone.calibrate()
    for ref in alone.manifest.shards:
        alone.cache_shard(ref)
    expected, made = LocalStore(url), LocalStore(Path(recipe.cache.url))
    assert made.list() == expected.list()
    assert [name for name in made.list() if made.get(name) != expected.get(name)] == []

    assert "submitted ray:tiny-cache-2" in dpal(*words)
    dpal("cancel", "ray:tiny-cache-2")
    _await(lambda: "stopped" in (told := dpal("status", "ray:tiny-cache-2")) or "succ" in told)


def test_what_ray_cannot_run_is_a_sentence(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    with pytest.raises(ConfigError, match="accepted is cache"):
        submit.submit(path, stage="train", on="ray", dry_run=True)


def test_a_dry_run_shows_the_request_and_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    recipe = tiny_recipe(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert submit.submit(path, ("cache.actors=2",), stage="cache", on="ray", dry_run=True) == ""
    told = capsys.readouterr().out
    assert "exec dpal cache" in told
    assert "actors: 2" in told


def test_a_job_server_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageError, match="Ray's job server"):
        submit.status("ray:tiny-cache-1")
