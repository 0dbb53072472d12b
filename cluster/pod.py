"""The pods of a Kubernetes job: image, resources, volumes, and how a node finds the others."""

from typing import Any

from cluster.spec import STOP_NOTICE_SECONDS, JobSpec

RECIPE_PATH = "/etc/dpal/recipe.yaml"
WORKDIR = "/dpal"  # mount point of the volume; relative paths of a recipe start here
COPIES = "/copies"
SECRET = "dpal-storage"  # optional Secret with the AWS_* variables
MASTER_PORT = 29500
GPU = "nvidia.com/gpu"
HEAD = {"cpu": "1", "memory": "4G"}


def worker_pod(spec: JobSpec, kind: str) -> dict[str, Any]:
    """Spec of the pod that does the work: one node of training, or one Ray worker."""
    resources = {"cpu": str(spec.cpus), "memory": f"{spec.memory_gb}G"}
    if spec.gpus:
        resources[GPU] = str(spec.gpus)
    if kind == "rayjob":
        return _pod(spec, _container("ray-worker", spec, resources))
    container = _container("dpal", spec, resources)
    # The image's entrypoint is `dpal`; copies of shards belong on the node, not on the volume.
    container["args"] = [spec.stage, RECIPE_PATH, f"storage.copies={COPIES}"]
    container["env"] += _rendezvous(spec)
    container["volumeMounts"].append({"name": "copies", "mountPath": COPIES})
    pod = _pod(spec, container)
    pod["volumes"].append({"name": "copies", "emptyDir": {}})
    return {**pod, "restartPolicy": "Never"}  # podFailurePolicy demands it


def head_pod(spec: JobSpec) -> dict[str, Any]:
    """Spec of the Ray head, which also runs the driver."""
    container = _container("ray-head", spec, HEAD)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
    ]
    return _pod(spec, container)


def _container(name: str, spec: JobSpec, resources: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name,
        "image": spec.image,
        "workingDir": WORKDIR,
        "env": [{"name": key, "value": value} for key, value in spec.env],
        "envFrom": [{"secretRef": {"name": SECRET, "optional": True}}],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "recipe", "mountPath": "/etc/dpal", "readOnly": True},
            {"name": "runs", "mountPath": WORKDIR},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _pod(spec: JobSpec, container: dict[str, Any]) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": STOP_NOTICE_SECONDS,  # SIGTERM, commit, exit 75
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": [
            {"name": "recipe", "configMap": {"name": spec.name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": spec.volume}},
            # The runtime's default of 64 MB is too small for NCCL and for Ray's object store.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2G"}},
        ],
    }


def _rendezvous(spec: JobSpec) -> list[dict[str, Any]]:
    """What `cluster.ranks.spawn_ranks` reads; a node's rank is the pod's completion index."""
    if spec.nodes == 1:
        return []
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "NUM_NODES", "value": str(spec.nodes)},
        {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "MASTER_ADDR", "value": f"{spec.name}-workers-0-0.{spec.name}"},
        {"name": "MASTER_PORT", "value": str(MASTER_PORT)},
    ]
