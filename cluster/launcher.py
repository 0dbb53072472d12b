"""The Launcher: the four things that every scheduler can do with a job, and how jobs are named."""

import shlex
import string
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from cluster.spec import JobSpec
from dpal.base.errors import ConfigError, StorageError

State = Literal["pending", "running", "succeeded", "failed", "stopped", "unknown"]
LIVE: tuple[State, ...] = ("pending", "running")
SCHEDULERS = ("local", "slurm", "kubernetes", "ray")


class JobStatus(NamedTuple):
    """What became of a job; `detail` is the scheduler's own word, with numbers."""

    state: State
    detail: str


class Launcher(Protocol):
    """One scheduler. Job ids begin with its name: `local:…`, `slurm:…`, `kubernetes:…`."""

    def render(self, spec: JobSpec) -> str:
        """The text that the scheduler is given. Raises ConfigError for what it cannot run."""
        ...

    def submit(self, spec: JobSpec, rendered: str) -> str:
        """Start the job, or find the living one of the same name; return its id."""
        ...

    def status(self, job: str) -> JobStatus:
        """Where the job stands. Raises ConfigError for an id that names no job."""
        ...

    def logs(self, job: str) -> Iterator[str]:
        """The lines that the job has printed so far, without their line ends."""
        ...

    def cancel(self, job: str) -> None:
        """Ask the job to stop for good; it may commit a checkpoint before it ends."""
        ...


def launcher(scheduler: str) -> Launcher:
    """The launcher of `scheduler`. Raises ConfigError for an unknown one."""
    if scheduler == "local":
        from cluster.local import LocalLauncher

        return LocalLauncher()
    if scheduler == "slurm":
        from cluster.slurm import SlurmLauncher

        return SlurmLauncher()
    if scheduler == "kubernetes":
        from cluster.kubernetes import KubernetesLauncher

        return KubernetesLauncher()
    if scheduler == "ray":
        from cluster.ray_cluster import RayLauncher

        return RayLauncher()
    raise ConfigError(f"scheduler {scheduler!r}: accepted are {', '.join(SCHEDULERS)}")


def launcher_of(job: str) -> Launcher:
    """The launcher that a job id belongs to. Raises ConfigError."""
    scheduler, colon, rest = job.partition(":")
    if not colon or not rest or scheduler not in SCHEDULERS:
        raise ConfigError(
            f"job {job!r}: accepted are the ids that dpal submit prints "
            "(local:<name>, slurm:<number>, kubernetes:<namespace>/<kind>/<name>, ray:<name>)"
        )
    return launcher(scheduler)


class _Template(string.Template):
    delimiter = "@"  # the dollar sign belongs to the shell


def fill_template(name: str, values: dict[str, str]) -> str:
    """The text of `cluster/templates/<name>` with every `@{key}` replaced."""
    text = (files("cluster") / "templates" / name).read_text()
    return _Template(text).substitute(values)


def shell_environment(spec: JobSpec) -> str:
    """Shell lines that put this installation's `dpal` first on the PATH and set `spec.env`."""
    lines = [f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in spec.env]
    return "\n".join(lines)


def call(command: Sequence[str], *, stdin: str = "", why: str) -> str:
    """Run a scheduler's own program and return what it prints.

    Raises:
        StorageError: the program is not installed, takes longer than a minute, or refuses;
            one sentence with `why` and the program's own last words.
    """
    program = command[0]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise StorageError(f"cannot {why}: {program} is not installed on this machine") from None
    except subprocess.TimeoutExpired:
        raise StorageError(f"cannot {why}: {program} did not answer within 60 s") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise StorageError(f"cannot {why}: {words}")
    return done.stdout
