"""Rendered manifests fit the schemas of Kubernetes, JobSet and KubeRay, and our own checks."""

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.kubernetes import KubernetesLauncher
from cluster.spec import JobSpec, job_spec
from dpal.base.config import load_recipe
from dpal.base.errors import ConfigError

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "jobs" / "recipes" / "demo.yaml"
SCHEMAS = ROOT.parent / "shared" / "schemas"
API = "1.30"
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
GPU_JOB = ("job.nodes=2", "job.gpus_per_node=4", "train.processes=4", "train.metrics_port=9400")


def spec_of(stage: Any, *overrides: str) -> JobSpec:
    return job_spec(load_recipe(RECIPE, overrides), RECIPE, (), stage)


def manifests(stage: str, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, job = yaml.safe_load_all(KubernetesLauncher().render(spec_of(stage, *overrides)))
    return config_map, job


def closed(schema: Any) -> Any:
    """The schema with every object closed, so that a misspelt field is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    shut = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        shut.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        shut.pop("type", None)
    return shut


@functools.cache
def crd_validator(kind: str, api_version: str) -> jsonschema.protocols.Validator:
    path = SCHEMAS / f"{kind.lower()}.yaml"
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/schemas")
    definition = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for version in definition["spec"]["versions"]:
        if version["name"] == api_version.rpartition("/")[2]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # checked by check_names
            return jsonschema.Draft202012Validator(schema)
    raise AssertionError(f"the CRD does not serve {api_version}")


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["kind"] == "JobSet":
        jobs = manifest["spec"]["replicatedJobs"]
        return [job["template"]["spec"]["template"] for job in jobs]
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def check(manifest: dict[str, Any]) -> None:
    """Everything that an API server would refuse, as far as schemas and rules say it."""
    crd_validator(manifest["kind"], manifest["apiVersion"]).validate(manifest)
    if manifest["kind"] == "JobSet":
        for job in manifest["spec"]["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
            kubernetes_validate.validate({**whole, "spec": job["template"]["spec"]}, API, True)
    for template in pod_templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, API, strict=True)
        check_pod(template["spec"], manifest["kind"])
    check_names(manifest)


def check_names(manifest: dict[str, Any]) -> None:
    metadata = manifest["metadata"]
    names = [metadata["name"], metadata["namespace"]]
    if manifest["kind"] == "JobSet":
        for job in manifest["spec"]["replicatedJobs"]:
            last = job["template"]["spec"]["completions"] - 1
            names.append(f"{metadata['name']}-{job['name']}-0-{last}")
    else:
        assert len(metadata["name"]) <= 47
    for name in names:
        assert LABEL.fullmatch(name), f"not a DNS-1123 label: {name}"


def check_pod(pod: dict[str, Any], kind: str) -> None:
    if kind == "JobSet":
        assert pod["restartPolicy"] == "Never", "podFailurePolicy demands Never"
    else:
        assert pod.get("restartPolicy", "Always") == "Always", "KubeRay restarts its pods itself"
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for amounts in container["resources"].values():
            for name, amount in amounts.items():
                assert QUANTITY.fullmatch(amount), f"{name}={amount} is not a quantity"
                if "/" in name:
                    assert amount.isdigit(), f"{name}={amount} is not an integer"


@pytest.mark.parametrize("stage", ["cache", "train", "run"])
@pytest.mark.parametrize("overrides", [(), GPU_JOB])
def test_every_manifest_fits_its_schema(stage: str, overrides: tuple[str, ...]) -> None:
    if stage == "run":
        overrides = tuple(item for item in overrides if "nodes" not in item)
    config_map, job = manifests(stage, *overrides)
    kubernetes_validate.validate(config_map, API, strict=True)
    check(job)


def set_at(*path: str | int) -> Callable[[dict[str, Any], Any], None]:
    def change(manifest: dict[str, Any], value: Any) -> None:
        node: Any = manifest
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value

    return change


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
CONTAINER = (*JOB, "template", "spec", "containers", 0)
REFUSALS = (jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)
DAMAGES = [
    (("spec", "failurPolicy"), {}),
    (("metadata", "name"), "Demo_train"),
    ((*JOB, "completionMod"), "Indexed"),
    ((*JOB, "completions"), "two"),
    ((*JOB, "template", "spec", "restartPolicy"), "Always"),
    ((*CONTAINER, "imagee"), "x"),
    ((*CONTAINER, "resources", "limits", "memory"), "8 GB"),
    ((*CONTAINER, "resources", "limits", "nvidia.com/gpu"), "0.5"),
    ((*CONTAINER, "volumeMounts", 0, "name"), "nothing"),
]


@pytest.mark.parametrize(("path", "value"), DAMAGES, ids=lambda item: str(item)[-30:])
def test_the_checks_refuse_a_damaged_manifest(path: tuple[str, ...], value: Any) -> None:
    manifest = copy.deepcopy(manifests("train", *GPU_JOB)[1])
    set_at(*path)(manifest, value)
    with pytest.raises(REFUSALS):
        check(manifest)


def test_the_recipe_in_the_config_map_is_the_recipe_of_the_run(tmp_path: Path) -> None:
    overrides = ("train.lr=3e-4", *GPU_JOB)
    config_map, _job = manifests("train", *overrides)
    carried = tmp_path / "recipe.yaml"
    carried.write_text(config_map["data"]["recipe.yaml"])
    assert load_recipe(carried) == load_recipe(RECIPE, overrides)


def test_exit_75_is_not_counted_and_mendable_errors_end_the_job() -> None:
    job = manifests("train", "job.max_restarts=3")[1]["spec"]
    rules = job["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob", 4: "FailJob"}
    assert job["failurePolicy"]["maxRestarts"] == 3


def test_nodes_find_each_other_and_take_their_rank_from_the_index() -> None:
    manifest = manifests("train", *GPU_JOB)[1]
    env = {
        item["name"]: item.get("value") or item["valueFrom"]["fieldRef"]["fieldPath"]
        for item in pod_templates(manifest)[0]["spec"]["containers"][0]["env"]
    }
    assert env["NUM_NODES"] == "2"
    assert env["NODE_RANK"].endswith("['batch.kubernetes.io/job-completion-index']")
    group = manifest["spec"]["replicatedJobs"][0]["name"]
    network = manifest["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert (
        env["MASTER_ADDR"] == f"{manifest['metadata']['name']}-{group}-0-0.{network['subdomain']}"
    )


def test_copies_of_shards_lie_on_the_node_and_not_on_the_shared_volume() -> None:
    pod = pod_templates(manifests("train", *GPU_JOB)[1])[0]["spec"]
    (container,) = pod["containers"]
    words = [word for word in container["args"] if "=" in word]
    copies = load_recipe(RECIPE, words).storage.copies
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "emptyDir" in volumes[mounts[copies]]


def test_no_secret_reaches_a_manifest(tmp_path: Path) -> None:
    recipe = tmp_path / "secret.yaml"
    recipe.write_text(RECIPE.read_text() + "storage: {key: AKEY, secret: ASECRET, retries: 7}\n")
    spec = job_spec(load_recipe(recipe), recipe, (), "train")
    rendered = KubernetesLauncher().render(spec)
    assert "retries: 7" in rendered
    assert "AKEY" not in rendered
    assert "ASECRET" not in rendered
    with pytest.raises(ConfigError, match=r"storage\.secret"):
        job_spec(load_recipe(RECIPE), RECIPE, ("storage.secret=x",), "train")


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("train", "job.namespace=Team_A", "job.namespace"),
        ("train", "job.image='a b'", "job.image"),
        ("train", "job.volume=../x", "job.volume"),
        ("cache", f"name={'n' * 42}", "at most 47"),
        ("run", "job.nodes=2", "job.nodes"),
        ("train", "job.gpus_per_node=3", "job.gpus_per_node"),
        ("cache", "cache.actors=3", "at most 2 actors"),
        ("cache", "cache.gpus_per_actor=0.5", "job.gpus_per_node=0"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(
    stage: str, override: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        manifests(stage, override)


@pytest.mark.parametrize("stage", ["train", "run"])
def test_the_longest_run_name_still_fits(stage: str) -> None:
    check(manifests(stage, f"name={'n' * 42}")[1])
