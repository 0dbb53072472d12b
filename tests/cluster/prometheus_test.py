"""A real Prometheus accepts our files, scrapes a real endpoint, and answers every query."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring.alerts import alerts
from cluster.monitoring.panels import panels
from cluster.ranks import free_port
from dpal.base import telemetry as t
from dpal.base.telemetry import METRICS, PrometheusTelemetry
from jobs.dashboards import write_dashboards

LABELS = {
    "term": ("total", "identity"),
    "phase": ("data", "step", "checkpoint"),
    "pattern": ("identity", "shape", "relation"),
    "reason": ("missing-target",),
}
QUERIES = [
    query.expr.replace("$__rate_interval", "10s").replace("$run", "test")
    for panel in panels()
    for query in panel.queries
]
# Minutes of one sample each, as promtool writes them: start, +step, x count.
QUIET = {
    f'{t.TRAIN_STEP.name}{{run="r"}}': "1+60x200",
    f'{t.TRAIN_STEPS.name}{{run="r"}}': "100000x200",
    f'{t.TRAIN_LOSS.name}{{run="r", term="total"}}': "2-0.01x200",
    f'{t.CHECKPOINT_TIME.name}{{run="r"}}': "0+60x200",
    f'{t.TRAIN_SECONDS.name}_sum{{run="r", phase="data"}}': "0+5x200",
    f'{t.TRAIN_SECONDS.name}_sum{{run="r", phase="step"}}': "0+55x200",
    f'{t.DATA_SKIPPED.name}{{run="r", reason="missing-target"}}': "0+0.1x200",
    f'{t.STORAGE_RETRIES.name}{{run="r"}}': "0+1x200",
}
# What has to change for each alert to fire; None takes the series away.
TROUBLE: dict[str, dict[str, str | None]] = {
    "DpalRunStalled": {f'{t.TRAIN_STEP.name}{{run="r"}}': "500x200"},
    "DpalNoCheckpoint": {f'{t.CHECKPOINT_TIME.name}{{run="r"}}': "60x200"},
    "DpalNeverCheckpointed": {f'{t.CHECKPOINT_TIME.name}{{run="r"}}': None},
    "DpalLossNotFinite": {f'{t.TRAIN_LOSS.name}{{run="r", term="total"}}': " ".join(["NaN"] * 200)},
    "DpalLossAbsent": {f'{t.TRAIN_LOSS.name}{{run="r", term="total"}}': None},
    "DpalDataWait": {f'{t.TRAIN_SECONDS.name}_sum{{run="r", phase="data"}}': "0+40x200"},
    "DpalSamplesSkipped": {f'{t.DATA_SKIPPED.name}{{run="r", reason="missing-target"}}': "0+2x200"},
    "DpalStorageRetries": {f'{t.STORAGE_RETRIES.name}{{run="r"}}': "0+30x200"},
}


@pytest.fixture(autouse=True)
def _installed() -> None:
    missing = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install prometheus)")


def promtool(*arguments: str, folder: Path) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return found


class Prometheus:
    """The real server on a free port, with the generated files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        command.append(f"--web.listen-address=127.0.0.1:{self.port}")
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def ask(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}?{query}") as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def series(self, expr: str) -> list[dict[str, Any]]:
        data = self.ask("/api/v1/query", query=expr)
        return data["result"] if data else []


def serve(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Iterator[Prometheus]:
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    edit(config)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = Prometheus(folder)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(20)


def feed(endpoint: PrometheusTelemetry, value: float) -> None:
    """Report every metric of the catalogue once for every value of its label."""
    for metric in METRICS:
        labels = [{name: word} for name in metric.labels for word in LABELS[name]] or [{}]
        for label in labels:
            endpoint.report(metric, value, **label)


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[tuple[Prometheus, PrometheusTelemetry]]:
    endpoint = PrometheusTelemetry(0, "test")
    write_dashboards(tmp_path)
    targets = [{"targets": [f"127.0.0.1:{endpoint.port}"]}]
    (tmp_path / "targets" / "runs.json").write_text(json.dumps(targets))
    servers = serve(tmp_path, lambda config: None)
    server = next(servers)
    try:
        yield server, endpoint
    finally:
        servers.close()
        endpoint.server.shutdown()
        endpoint.server.server_close()


def test_a_live_prometheus_answers_every_query_of_the_dashboard(
    scraped: tuple[Prometheus, PrometheusTelemetry],
) -> None:
    server, endpoint = scraped
    shards = itertools.count()

    def numbers(expr: str) -> list[dict[str, Any]]:
        feed(endpoint, 1.0)  # goes on while we ask: a rate needs scrapes that differ
        endpoint.report(t.CACHE_SHARDS, next(shards))  # so does the time a cache job still takes
        found = server.series(expr)
        return [] if any(row["value"][1] == "NaN" for row in found) else found

    for expr in QUERIES:
        found = wait_for(lambda expr=expr: numbers(expr))
        assert all(row["metric"].get("run") == "test" for row in found), expr
    by_term = server.series(t.TRAIN_LOSS.name)
    assert {row["metric"]["term"] for row in by_term} == {"total", "identity"}
    groups = wait_for(
        lambda: [
            rule
            for group in server.ask("/api/v1/rules")["groups"]
            for rule in group["rules"]
            if rule["health"] != "unknown"
        ]
    )
    assert [rule["name"] for rule in groups if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in groups} == {alert.name for alert in alerts()}


def test_promtool_accepts_the_generated_files(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    promtool("check", "config", "prometheus.yml", folder=tmp_path)
    promtool("check", "rules", "rules.yml", folder=tmp_path)


def rule_test(series: dict[str, str], firing: str | None) -> dict[str, Any]:
    """One promtool test two hours in: `firing` fires and no other, or none does."""
    rows = [{"series": name, "values": values} for name, values in series.items()]
    checks = []
    for alert in alerts():
        expected = []
        if alert.name == firing:
            expected = [{"exp_labels": {"severity": alert.severity, "run": "r"}}]
            if firing == "DpalSamplesSkipped":
                expected[0]["exp_labels"]["reason"] = "missing-target"
            if firing == "DpalLossNotFinite":
                expected[0]["exp_labels"]["term"] = "total"
            expected[0]["exp_annotations"] = annotations(alert.summary, alert.todo)
        checks.append({"eval_time": "2h", "alertname": alert.name, "exp_alerts": expected})
    return {"interval": "1m", "input_series": rows, "alert_rule_test": checks}


def annotations(summary: str, todo: str) -> dict[str, str]:
    values = {
        "{{ $labels.run }}": "r",
        "{{ $labels.term }}": "total",
        "{{ $labels.reason }}": "missing-target",
        "{{ $value | humanizePercentage }}": "42.11%",  # 40 of 95 seconds
    }
    for template, value in values.items():
        summary = summary.replace(template, value)
    return {"summary": summary, "description": todo}


@pytest.mark.parametrize("firing", [None, *(alert.name for alert in alerts())])
def test_each_alert_fires_on_its_own_trouble_alone(firing: str | None, tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    series: dict[str, str | None] = {**QUIET, **(TROUBLE[firing] if firing else {})}
    kept = {name: values for name, values in series.items() if values is not None}
    cases = {"rule_files": ["rules.yml"], "tests": [rule_test(kept, firing)]}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
    promtool("test", "rules", "cases.yml", folder=tmp_path)


def test_pods_are_found_by_label_port_and_rank(tmp_path: Path) -> None:
    """The relabelling for Kubernetes, fed with pods from a file instead of an API server."""
    write_dashboards(tmp_path)
    kubernetes = yaml.safe_load((tmp_path / "prometheus-kubernetes.yml").read_text())
    meta = "__meta_kubernetes_pod_"

    def pod(name: str, app: str, port: str, index: str) -> dict[str, Any]:
        labels = {
            f"{meta}name": name,
            f"{meta}ip": "127.0.0.9",
            f"{meta}label_app_kubernetes_io_name": app,
            f"{meta}annotation_dpal_metrics_port": port,
            f"{meta}annotation_batch_kubernetes_io_job_completion_index": index,
            "__meta_kubernetes_namespace": "team",
        }
        return {"targets": ["ignored:1"], "labels": labels}

    pods = [
        pod("rank-0", "dpal", "9400", "0"),
        pod("ray-head", "dpal", "9401", ""),
        pod("rank-1", "dpal", "9400", "1"),
        pod("no-endpoint", "dpal", "0", "0"),
        pod("stranger", "web", "9400", "0"),
    ]
    (tmp_path / "targets" / "runs.json").write_text(json.dumps(pods))

    def relabel(config: dict[str, Any]) -> None:
        rules = kubernetes["scrape_configs"][0]["relabel_configs"]
        config["scrape_configs"][0]["relabel_configs"] = rules

    servers = serve(tmp_path, relabel)
    server = next(servers)
    try:
        targets = wait_for(lambda: (server.ask("/api/v1/targets") or {}).get("activeTargets"))
    finally:
        servers.close()
    found = {target["labels"]["pod"]: target["scrapeUrl"] for target in targets}
    assert found == {
        "rank-0": "http://127.0.0.9:9400/metrics",
        "ray-head": "http://127.0.0.9:9401/metrics",
    }
    assert {target["labels"]["namespace"] for target in targets} == {"team"}
