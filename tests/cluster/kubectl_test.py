"""The real kubectl carries our jobs to an API server, and back: submit, status, logs, cancel."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from api_server import ApiServer

from dpal.base.errors import ConfigError, DataError, StorageError
from jobs import submit as verbs

RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "demo.yaml"
JOBSET = ("jobsets", "default", "demo-train")
RAYJOB = ("rayjobs", "default", "demo-cache")


def validate(body: dict[str, Any]) -> None:
    """Refuse what a server would of the kinds whose schema is at hand everywhere."""
    if body["kind"] == "ConfigMap":
        kubernetes_validate.validate(body, "1.30", strict=True)
    if "broken" in body["metadata"]["name"]:
        raise ValueError(f"{body['kind']}: admission refuses the name")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    if shutil.which("kubectl") is None:
        pytest.skip("not installed: kubectl")
    api = ApiServer(validate)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": api.url}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": ""}}],
        "current-context": "test",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("KUBECACHEDIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield api
    api.close()


def submit(stage: str, *overrides: str) -> str:
    return verbs.submit(RECIPE, overrides, stage=stage, on="kubernetes")


def test_a_training_job_arrives_with_its_recipe(server: ApiServer) -> None:
    job = submit("train", "train.lr=3e-4")
    assert job == "kubernetes:default/jobset/demo-train"
    assert server.objects[JOBSET]["spec"]["replicatedJobs"][0]["name"] == "workers"
    carried = server.objects["configmaps", "default", "demo-train"]["data"]["recipe.yaml"]
    assert yaml.safe_load(carried)["train"]["lr"] == 3e-4
    assert verbs.status(job).state == "pending"


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({"replicatedJobsStatus": [{"name": "workers", "ready": 1, "active": 1}]}, "running"),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, "succeeded"),
        ({"conditions": [{"type": "Failed", "status": "True", "message": "x"}]}, "failed"),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, "pending"),
    ],
)
def test_the_state_of_a_job_set(server: ApiServer, status: dict[str, Any], state: str) -> None:
    job = submit("train")
    server.objects[JOBSET]["status"] = {"restarts": 2, **status}
    assert verbs.status(job).state == state
    assert "2 restarts" in verbs.status(job).detail


@pytest.mark.parametrize(
    ("deployment", "ray", "state"),
    [
        ("Initializing", "", "pending"),
        ("Running", "RUNNING", "running"),
        ("Retrying", "FAILED", "pending"),
        ("Complete", "SUCCEEDED", "succeeded"),
        ("Failed", "RUNNING", "failed"),
    ],
)
def test_the_state_of_a_ray_job(server: ApiServer, deployment: str, ray: str, state: str) -> None:
    job = submit("cache")
    server.objects[RAYJOB]["status"] = {"jobDeploymentStatus": deployment, "jobStatus": ray}
    assert verbs.status(job).state == state


def test_a_living_job_is_not_submitted_twice_and_a_finished_one_is_replaced(
    server: ApiServer,
) -> None:
    job = submit("train")
    first = server.objects[JOBSET]["metadata"]["uid"]
    assert submit("train", "train.lr=5e-4") == job
    assert server.objects[JOBSET]["metadata"]["uid"] == first
    done = {"type": "Completed", "status": "True"}
    server.objects[JOBSET]["status"] = {"conditions": [done]}
    assert submit("train") == job
    assert server.objects[JOBSET]["metadata"]["uid"] != first
    assert "status" not in server.objects[JOBSET]


def test_logs_are_those_of_the_jobs_pods(server: ApiServer) -> None:
    job = submit("train")
    for name, owner in (("demo-train-workers-0-0", "demo-train"), ("other", "somebody")):
        labels = {"jobset.sigs.k8s.io/jobset-name": owner}
        server.objects["pods", "default", name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": labels},
            "spec": {"containers": [{"name": "dpal", "image": "x"}]},
        }
        server.logs[name] = f"step 1 of {name}\n"
    lines = list(verbs.logs(job))
    assert len(lines) == 1
    assert "step 1 of demo-train-workers-0-0" in lines[0]


def test_cancel_deletes_and_is_no_error_twice(server: ApiServer) -> None:
    job = submit("train")
    verbs.cancel(job)
    assert JOBSET not in server.objects
    verbs.cancel(job)
    assert verbs.status(job).state == "unknown"
    with pytest.raises(DataError, match="does not exist"):
        list(verbs.logs(job))


def test_a_refusal_of_the_server_is_one_sentence(server: ApiServer) -> None:
    with pytest.raises(StorageError, match="admission refuses") as refused:
        submit("train", "name=broken")
    assert "\n" not in str(refused.value)


def test_an_unreachable_cluster_is_one_sentence(server: ApiServer) -> None:
    server.close()
    with pytest.raises(StorageError, match=r"cannot (submit|find)"):
        submit("train")


def test_without_kubectl_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="kubectl is not installed"):
        submit("train")


def test_what_is_not_of_the_form_of_a_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="letters"):
        verbs.status("kubernetes:default/jobset/--all")
