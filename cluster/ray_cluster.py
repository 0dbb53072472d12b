"""An existing Ray cluster as a scheduler of the stage `cache`, through Ray's job server (HTTP).

Where that listens is `RAY_API_SERVER_ADDRESS` (else port 8265 of this machine), and a cluster with
token authentication wants `RAY_AUTH_MODE=token` and its token here too, as for `ray job submit`.
"""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cluster.launcher import LIVE, JobStatus, State
from cluster.spec import JobSpec, require_name
from dpal.base.errors import EXIT_RUN_AGAIN, ConfigError, StorageError

ADDRESS = "http://127.0.0.1:8265"  # Ray's default
RECIPE = "recipe.yaml"
STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayLauncher:
    """Uploads the recipe and runs `dpal cache` on the head; ids are `ray:<name>-<number>`."""

    def render(self, spec: JobSpec) -> str:
        """The job server's request, as YAML.

        Raises:
            ConfigError: for any stage but cache, or a name that Ray would refuse.
        """
        if spec.stage != "cache":
            raise ConfigError(
                f"--stage {spec.stage} on ray: accepted is cache; other stages do not use Ray"
            )
        require_name("name", spec.name)
        entrypoint = (
            f'R="$PWD/{RECIPE}" && cd {shlex.quote(spec.workdir)} && '
            'exec dpal cache "$R" cache.ray_address=auto'
        )
        request = {
            "entrypoint": f"{_setup(spec)}{entrypoint}",
            "runtime_env": {
                "working_dir": {RECIPE: spec.recipe},
                "env_vars": {"PYTHONUNBUFFERED": "1"},
            },
            "metadata": {"dpal": spec.name},
        }
        return yaml.safe_dump(request, sort_keys=False, width=100)

    def submit(self, spec: JobSpec, rendered: str) -> str:
        """Hand the job in unless one of this name lives. Raises StorageError."""
        request = yaml.safe_load(rendered)
        files = request["runtime_env"].pop("working_dir")
        with _client(f"submit {spec.name}") as client, tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                (Path(folder) / name).write_text(text)
            numbers = [0]
            for found in client.list_jobs():
                match = re.fullmatch(rf"{re.escape(spec.name)}-(\d+)", found.submission_id or "")
                if match and STATES.get(found.status.value) in LIVE:
                    return f"ray:{found.submission_id}"
                numbers.append(int(match[1]) if match else 0)
            job = client.submit_job(
                entrypoint=request["entrypoint"],
                submission_id=f"{spec.name}-{max(numbers) + 1}",
                runtime_env={**request["runtime_env"], "working_dir": folder},
                metadata=request["metadata"],
            )
        return f"ray:{job}"

    def status(self, job: str) -> JobStatus:
        """As the job server tells it. Raises StorageError."""
        with _client(f"find {job}") as client:
            found = client.get_job_info(_name(job))
        state = STATES.get(found.status.value, "unknown")
        if state == "failed" and found.driver_exit_code == EXIT_RUN_AGAIN:
            state = "stopped"
        message = " ".join((found.message or "").split())
        return JobStatus(state, f"{found.status.value}{f': {message}' if message else ''}")

    def logs(self, job: str) -> Iterator[str]:
        """What the driver has printed so far. Raises StorageError."""
        with _client(f"read the logs of {job}") as client:
            text: str = client.get_job_logs(_name(job))
        yield from text.splitlines()

    def cancel(self, job: str) -> None:
        """SIGTERM to the driver; finished shards stay. Raises StorageError."""
        with _client(f"cancel {job}") as client:
            client.stop_job(_name(job))


def _setup(spec: JobSpec) -> str:
    return f"{spec.setup} && " if spec.setup else ""


def _name(job: str) -> str:
    """The submission id in a job id. Raises ConfigError."""
    name = job.removeprefix("ray:")
    require_name("job", name, 80)
    return name


@contextmanager
def _client(why: str) -> Iterator[Any]:
    """The job server's client. Raises StorageError when it refuses or is not there."""
    from ray.exceptions import AuthenticationError  # the import takes a second
    from ray.job_submission import JobSubmissionClient

    address = os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS)
    try:
        yield JobSubmissionClient(address)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StorageError(f"cannot {why}: Ray's job server {address} says: {words}") from None
