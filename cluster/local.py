"""This machine as a scheduler: a detached process group with its script, log and exit code.

`python -m cluster.local FOLDER RESTARTS` is the supervisor that `LocalLauncher.submit` starts.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from cluster.launcher import JobStatus, State, fill_template, shell_environment
from cluster.ranks import die_with_parent
from cluster.spec import MENDABLE, JobSpec
from dpal.base.errors import EXIT_BUG, EXIT_DONE, EXIT_RUN_AGAIN, ConfigError, StorageError

SCRIPT, LOCK, LOG, RESULT = "job.sh", "lock", "log", "result.json"
PAUSE_SECONDS = 1.0  # between two tries; a script that fails at once must not spin


class LocalLauncher:
    """Jobs live in `<run folder>/jobs/<name>/`; whoever holds the lock in there is running it."""

    def render(self, spec: JobSpec) -> str:
        """A shell script. Raises ConfigError for more than one node."""
        if spec.nodes > 1:
            raise ConfigError(f"job.nodes={spec.nodes} on this machine alone; accepted is 1")
        return fill_template(
            "local.sh",
            {
                "name": spec.name,
                "environment": shell_environment(spec),
                "setup": spec.setup,
                "workdir": shlex.quote(spec.workdir),
                "command": shlex.join(spec.command),
            },
        )

    def submit(self, spec: JobSpec, rendered: str) -> str:
        """Start the supervisor unless one holds the lock. Raises StorageError."""
        folder = Path(spec.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOCK).open("a+") as lock:
                if _try_lock(lock.fileno()):
                    (folder / RESULT).unlink(missing_ok=True)
                    (folder / SCRIPT).write_text(rendered)
                    pid = _start_supervisor(folder, spec.max_restarts, lock.fileno())
                    lock.truncate(0)
                    lock.write(str(pid))
        except OSError as error:
            raise StorageError(f"cannot use {str(folder)!r}: {error.strerror}") from None
        return _job_id(folder)

    def status(self, job: str) -> JobStatus:
        """Read from the lock and the result. Raises ConfigError for an unknown job."""
        folder = _folder(job)
        with (folder / LOCK).open("r+") as lock:
            if not _try_lock(lock.fileno()):
                return JobStatus("running", f"process group {lock.read()}")
        try:
            result = json.loads((folder / RESULT).read_text())
        except FileNotFoundError:
            return JobStatus("failed", "its supervisor was killed; submit it again to go on")
        code, detail = result["code"], f"exit code {result['code']}, {result['restarts']} restarts"
        state: State = "succeeded" if code == EXIT_DONE else "failed"
        if code == EXIT_RUN_AGAIN or (result["cancelled"] and code != EXIT_DONE):
            state = "stopped"
        return JobStatus(state, detail)

    def logs(self, job: str) -> Iterator[str]:
        """Everything that the job and its restarts have printed."""
        path = _folder(job) / LOG
        if path.is_file():
            with path.open(errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines)

    def cancel(self, job: str) -> None:
        """SIGTERM to the process group; the training program commits and ends."""
        folder = _folder(job)
        with (folder / LOCK).open("r+") as lock:
            if not _try_lock(lock.fileno()):
                os.killpg(int(lock.read()), signal.SIGTERM)


def supervise(folder: Path, max_restarts: int) -> int:
    """Run `job.sh` of `folder` until it is done, cancelled, or out of restarts; its last code.

    Run again: 75, and errors that a second try can mend (not 2, 3, 4). Both count, because
    nobody else limits a job on this machine.
    """
    cancelled: list[int] = []

    def cancel(number: int, _frame: FrameType | None) -> None:
        cancelled.append(number)

    signal.signal(signal.SIGTERM, cancel)
    signal.signal(signal.SIGINT, cancel)
    code, restarts = EXIT_BUG, 0
    with (folder / LOG).open("ab", buffering=0) as log:
        while not cancelled:
            status = _run_script(folder, log.fileno()).wait()
            code = status if status >= 0 else EXIT_BUG
            log.write(f"job: exit code {code}, {restarts} restarts so far\n".encode())
            if code in (EXIT_DONE, *MENDABLE) or restarts == max_restarts:
                break
            time.sleep(PAUSE_SECONDS)
            restarts += not cancelled
    result = {"code": code, "restarts": restarts, "cancelled": bool(cancelled)}
    aside = folder / f"{RESULT}.tmp"
    aside.write_text(json.dumps(result))
    aside.replace(folder / RESULT)
    return code


def _run_script(folder: Path, log: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", str(folder / SCRIPT)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        preexec_fn=die_with_parent(signal.SIGTERM),
    )


def _start_supervisor(folder: Path, max_restarts: int, lock: int) -> int:
    """Detach a supervisor that inherits the lock, so that no moment is without a holder."""
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.local", str(folder), str(max_restarts)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )
    process.returncode = EXIT_DONE  # it outlives us on purpose: no warning about that
    return process.pid


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _job_id(folder: Path) -> str:
    """`local:<name>` for a run folder below this one, else `local:<path of the job folder>`."""
    found = list(Path.cwd().glob(f"*/*/jobs/{folder.name}"))
    return f"local:{folder.name if found == [folder] else folder}"


def _folder(job: str) -> Path:
    name = job.removeprefix("local:")
    found = [Path(name)] if "/" in name else list(Path.cwd().glob(f"*/*/jobs/{name}"))
    found = [folder for folder in found if (folder / LOCK).is_file()]
    if len(found) != 1:
        raise ConfigError(
            f"job {job!r}: {len(found)} of that name below {str(Path.cwd())!r}; accepted is "
            "local:<name>, or local:<path of its folder>"
        )
    return found[0]


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2])))
