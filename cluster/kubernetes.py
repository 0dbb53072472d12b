"""Kubernetes: training as a JobSet, caching as a RayJob, through `kubectl`."""

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import yaml

from cluster.launcher import LIVE, JobStatus, State, call, fill_template
from cluster.pod import RECIPE_PATH, WORKDIR, head_pod, worker_pod
from cluster.spec import MENDABLE, JobSpec, require_name
from dpal.base.errors import EXIT_RUN_AGAIN, ConfigError, DataError

# Names that controllers derive must stay within 63: `<name>-workers-0-<index>` and KubeRay's own
# suffixes (KubeRay refuses a RayJob whose name is longer than 47).
MAX_NAME = {"jobset": 49, "rayjob": 47}
RESOURCES = {"jobset": "jobsets.jobset.x-k8s.io", "rayjob": "rayjobs.ray.io"}
SELECTORS = {"jobset": "jobset.sigs.k8s.io/jobset-name", "rayjob": "job-name"}
RAY_STATES: dict[str, State] = {
    "": "pending",
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class KubernetesLauncher:
    """Writes manifests, hands them to `kubectl apply`, reads the status that controllers keep."""

    def render(self, spec: JobSpec) -> str:
        """A ConfigMap with the recipe, and the JobSet or RayJob that mounts it.

        Raises:
            ConfigError: a name that Kubernetes would refuse, or a run folder outside the volume.
        """
        kind = _kind(spec)
        require_name("job.namespace", spec.namespace)
        require_name("job.volume", spec.volume)
        require_name("name", spec.name, MAX_NAME[kind])
        if not re.fullmatch(r"[^\s\"']+", spec.image):
            raise ConfigError(f"job.image={spec.image!r}: accepted is the name of an image")
        labels = {"app.kubernetes.io/name": "dpal", "app.kubernetes.io/instance": spec.name}
        values: dict[str, Any] = {
            "name": spec.name,
            "namespace": spec.namespace,
            "labels": labels,
            "annotations": {"dpal/metrics-port": str(spec.metrics_port)},
            "nodes": spec.nodes,
            "max_restarts": spec.max_restarts,
            "deadline_s": spec.time_minutes * 60,
        }
        if kind == "jobset":
            values |= {"run_again": EXIT_RUN_AGAIN, "mendable": MENDABLE}
        else:
            command = ["dpal", spec.stage, RECIPE_PATH, "cache.ray_address=auto"]
            values |= {
                "entrypoint": f"cd {WORKDIR} && exec {shlex.join(command)}",
                "ray_version": version("ray"),
            }
        filled = {key: json.dumps(value) for key, value in values.items()}
        filled["recipe"] = textwrap.indent(spec.recipe, " " * 4).rstrip()
        filled["pod"] = _block(worker_pod(spec, kind), 14 if kind == "jobset" else 12)
        filled["head_pod"] = _block(head_pod(spec), 10)
        return fill_template(f"{kind}.yaml", filled)

    def submit(self, spec: JobSpec, rendered: str) -> str:
        """Apply the manifest unless a job of this name lives; a finished one is replaced."""
        kind = _kind(spec)
        job = f"kubernetes:{spec.namespace}/{kind}/{spec.name}"
        found = self._get(job)
        if found is not None:
            if _status(kind, found).state in LIVE:
                return job
            self._delete(job, wait=True)
        call(["kubectl", "apply", "-f", "-"], stdin=rendered, why=f"submit {spec.name}")
        return job

    def status(self, job: str) -> JobStatus:
        """Read from the conditions of the JobSet or RayJob."""
        found = self._get(job)
        if found is None:
            return JobStatus("unknown", "no such object (deleted, or removed a day after its end)")
        return _status(_parts(job)[1], found)

    def logs(self, job: str) -> Iterator[str]:
        """What the job's pods have printed so far, each line with its pod in front."""
        namespace, kind, name = _parts(job)
        if self._get(job) is None:
            raise DataError(f"job {job!r} does not exist any more, and its logs with it")
        selector = f"--selector={SELECTORS[kind]}={name}"
        limits = ["--prefix", "--tail=-1", "--max-log-requests=512"]
        command = ["kubectl", "logs", f"--namespace={namespace}", selector, *limits]
        yield from call(command, why=f"read the logs of {job}").splitlines()

    def cancel(self, job: str) -> None:
        """Delete the object; its pods get SIGTERM and time to commit."""
        if self._get(job) is not None:
            self._delete(job, wait=False)

    def _get(self, job: str) -> dict[str, Any] | None:
        namespace, kind, name = _parts(job)
        target = [f"--namespace={namespace}", RESOURCES[kind], name]
        printed = call(
            ["kubectl", "get", *target, "--ignore-not-found", "--output=json"],
            why=f"find {job}",
        )
        found: dict[str, Any] | None = json.loads(printed) if printed.strip() else None
        return found

    def _delete(self, job: str, *, wait: bool) -> None:
        namespace, kind, name = _parts(job)
        target = [f"--namespace={namespace}", RESOURCES[kind], name]
        manner = ["--ignore-not-found", f"--wait={str(wait).lower()}", "--timeout=50s"]
        call(["kubectl", "delete", *target, *manner], why=f"delete {job}")


def _block(value: dict[str, Any], indent: int) -> str:
    """YAML lines of `value` at the depth where its template has them."""
    return textwrap.indent(yaml.safe_dump(value, sort_keys=False), " " * indent).rstrip()


def _kind(spec: JobSpec) -> str:
    return "rayjob" if spec.stage == "cache" else "jobset"


def _parts(job: str) -> tuple[str, str, str]:
    parts = job.removeprefix("kubernetes:").split("/")
    if len(parts) != 3 or not all(parts) or parts[1] not in RESOURCES:
        raise ConfigError(
            f"job {job!r}: accepted is kubernetes:<namespace>/<kind>/<name>, "
            f"where the kind is {' or '.join(RESOURCES)}"
        )
    require_name("namespace", parts[0])
    require_name("job", parts[2])
    return parts[0], parts[1], parts[2]


def _status(kind: str, found: dict[str, Any]) -> JobStatus:
    status = found.get("status", {})
    return _ray_status(status) if kind == "rayjob" else _jobset_status(status)


def _jobset_status(status: dict[str, Any]) -> JobStatus:
    restarts = f"{status.get('restarts', 0)} restarts"
    for condition in status.get("conditions", []):
        if condition["status"] != "True":
            continue
        detail = f"{condition['type']}: {condition.get('message', '')}, {restarts}"
        if condition["type"] == "Completed":
            return JobStatus("succeeded", detail)
        if condition["type"] == "Failed":
            return JobStatus("failed", detail)
        if condition["type"] == "Suspended":
            return JobStatus("pending", detail)
    groups = status.get("replicatedJobsStatus", [])
    ready = sum(group.get("ready", 0) for group in groups)
    active = sum(group.get("active", 0) for group in groups)
    return JobStatus(
        "running" if ready else "pending", f"{ready} of {active} active jobs ready, {restarts}"
    )


def _ray_status(status: dict[str, Any]) -> JobStatus:
    state = RAY_STATES.get(status.get("jobStatus", ""), "unknown")
    deployment = status.get("jobDeploymentStatus", "not seen by KubeRay yet")
    if deployment == "Failed":
        state = "failed"
    elif deployment in ("Retrying", "Waiting", "Initializing"):
        state = "pending"
    message = status.get("message", "")
    return JobStatus(state, f"{deployment}{f', {message}' if message else ''}")
