"""Prometheus configurations: one for targets listed in files, one for pods in Kubernetes."""

import json
from typing import Any

import yaml

INTERVAL = "15s"
DEFAULT_TARGET = "localhost:9400"


def prometheus_config() -> str:
    """Scrapes what `targets/*.json` lists: local runs and Slurm nodes."""
    return _config({"file_sd_configs": [{"files": ["targets/*.json"]}]})


def kubernetes_config() -> str:
    """Finds the pods of our jobs by label, and their port by annotation; runs in the cluster.

    Pods of a recipe with train.metrics_port=0 have no endpoint and are left out.
    """
    pod = "__meta_kubernetes_pod"
    label, port = f"{pod}_label_app_kubernetes_io_name", f"{pod}_annotation_dpal_metrics_port"
    index = f"{pod}_annotation_batch_kubernetes_io_job_completion_index"
    relabel = [
        {"action": "keep", "source_labels": [label], "regex": "dpal"},
        {"action": "keep", "source_labels": [port], "regex": "[1-9][0-9]*"},
        {"action": "keep", "source_labels": [index], "regex": "0?"},  # rank 0 has the endpoint
        {
            "source_labels": [f"{pod}_ip", port],
            "separator": ":",
            "target_label": "__address__",
        },
        {"source_labels": [f"{pod}_name"], "target_label": "pod"},
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
    ]
    return _config({"kubernetes_sd_configs": [{"role": "pod"}], "relabel_configs": relabel})


def targets() -> str:
    """A first target list: a run on this machine with train.metrics_port=9400."""
    return json.dumps([{"targets": [DEFAULT_TARGET]}], indent=2) + "\n"


def _config(discovery: dict[str, Any]) -> str:
    config = {
        "global": {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "dpal", **discovery}],
    }
    return yaml.safe_dump(config, sort_keys=False)
