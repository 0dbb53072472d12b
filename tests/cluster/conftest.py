"""A real Slurm of two nodes on this host: munged, slurmctld, two slurmd, one temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster.ranks import free_port

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "setpriv")

SLURM_CONF = """\
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
SlurmdTimeout=30
KillWait=5
JobRequeue=1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(NamedTuple):
    """A running cluster; `conf` is what SLURM_CONF must name."""

    folder: Path
    conf: Path


class _Daemons:
    """Processes of this fixture only, ended by their ids in reverse order."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder, self._env = folder, env
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> None:
        log = (self._folder / "log" / f"{Path(command[0]).name}.out").open("ab")
        self._running.append(
            subprocess.Popen(command, stdout=log, stderr=log, env=self._env, start_new_session=True)
        )

    def end(self) -> None:
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The cluster, up and idle; skipped where Slurm is absent or the user is not root."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("a real Slurm is started by root only")
    folder = tmp_path_factory.mktemp("slurm")
    conf = folder / "slurm.conf"
    for name in ("state", "spool/node1", "spool/node2", "log", "munge"):
        (folder / name).mkdir(parents=True)
    ports = [free_port() for _ in range(3)]
    conf.write_text(
        SLURM_CONF.format(
            folder=folder,
            host=socket.gethostname().partition(".")[0],
            controller_port=ports[0],
            port1=ports[1],
            port2=ports[2],
        )
    )
    env = {**os.environ, "SLURM_CONF": str(conf)}
    daemons = _Daemons(folder, env)
    try:
        _start_munge(folder / "munge", daemons)
        daemons.start("slurmctld", "-D", "-f", str(conf))
        for node in ("node1", "node2"):
            daemons.start("slurmd", "-D", "-f", str(conf), "-N", node)
        _wait_idle(folder, env)
        yield Slurm(folder, conf)
    finally:
        daemons.end()


@pytest.fixture
def on_slurm(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Point this process at the cluster; jobs that a test leaves behind are cancelled."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    yield slurm
    env = {**os.environ, "SLURM_CONF": str(slurm.conf)}
    subprocess.run(["scancel", "--partition=debug"], env=env, check=False)
    _wait_idle(slurm.folder, env)


def _start_munge(folder: Path, daemons: _Daemons) -> None:
    """A munged of our own, as root with a key and socket of its own, apart from the system's."""
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    daemons.start(
        "munged",
        "--foreground",
        "--force",
        f"--socket={folder}/socket",
        f"--key-file={key}",
        f"--log-file={folder}/log",
        f"--pid-file={folder}/pid",
        f"--seed-file={folder}/seed",
    )
    _wait((folder / "socket").exists, "munged", folder)


def _wait_idle(folder: Path, env: dict[str, str]) -> None:
    def idle() -> bool:
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        answer = subprocess.run(command, env=env, capture_output=True, text=True)
        return answer.stdout.split() == ["idle", "idle"]

    _wait(idle, "two idle nodes", folder)


def _wait(condition, what: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text()[-2000:] for path in folder.rglob("*.[ol]*") if path.is_file()]
            pytest.fail(f"no {what} after 60 s\n" + "\n".join(logs))
        time.sleep(0.2)
