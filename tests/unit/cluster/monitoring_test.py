"""Dashboard, rules and scrape files: from the catalogue alone, parseable, the same every time."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from cluster.monitoring import grafana
from cluster.monitoring.alerts import alerts
from cluster.monitoring.panels import panels
from dpal.base.errors import StorageError
from dpal.base.telemetry import METRICS
from jobs.dashboards import write_dashboards

ON_A_SERVER = {"$__rate_interval": "1m", "$run": ".*"}  # what Grafana puts in
QUERIES = [query.expr for panel in panels() for query in panel.queries]
ALERTS = [alert.expr for alert in alerts()]


def plain(expr: str) -> str:
    for variable, value in ON_A_SERVER.items():
        expr = expr.replace(variable, value)
    return expr


def series_names() -> set[str]:
    """Names of the series that the catalogue's metrics are exposed as."""
    names = set()
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.name + ending for ending in endings}
    return names


def selectors(node: Any) -> list[Any]:
    """Every vector selector below a parsed expression."""
    found = [node] if isinstance(node, promql_parser.VectorSelector) else []
    for name in ("expr", "lhs", "rhs", "args", "param", "vector_selector", "vs"):
        child = getattr(node, name, None)
        for item in child if isinstance(child, list) else [child]:
            if item is not None and not isinstance(item, str | float):
                found += selectors(item)
    return found


@pytest.mark.parametrize("expr", QUERIES + ALERTS)
def test_every_query_parses_and_asks_for_metrics_of_the_catalogue(expr: str) -> None:
    found = selectors(promql_parser.parse(plain(expr)))
    assert found
    assert {selector.name for selector in found} <= series_names()


def test_every_metric_of_the_catalogue_is_on_the_dashboard() -> None:
    asked = {s.name for expr in QUERIES for s in selectors(promql_parser.parse(plain(expr)))}
    missing = [m.name for m in METRICS if not any(name.startswith(m.name) for name in asked)]
    assert missing == []


def test_labels_asked_for_are_labels_of_the_metric() -> None:
    labels = {metric.name: {"run", "le", *metric.labels} for metric in METRICS}
    for expr in QUERIES + ALERTS:
        for selector in selectors(promql_parser.parse(plain(expr))):
            metric = re.sub("_(bucket|sum|count)$", "", selector.name)
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= labels[metric], f"{expr}: {asked}"


def test_a_panel_shows_the_metrics_it_describes() -> None:
    for panel in panels():
        text = " ".join(query.expr for query in panel.queries)
        assert all(metric.name in text for metric in panel.metrics), panel.title


def test_panels_have_ids_and_places_of_their_own() -> None:
    model = json.loads(grafana.dashboard())
    placed = [tuple(panel["gridPos"].values()) for panel in model["panels"]]
    assert len(set(placed)) == len(placed) == len(panels())
    assert all(x + width <= 24 for x, _y, width, _h in placed)
    assert len({panel["id"] for panel in model["panels"]}) == len(placed)


def test_a_rerun_changes_no_byte_and_keeps_the_users_targets(tmp_path: Path) -> None:
    write_dashboards(tmp_path)
    (tmp_path / "targets" / "runs.json").write_text('[{"targets": ["node7:9400"]}]')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = write_dashboards(tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after
    assert set(written) == set(after) - {tmp_path / "targets" / "runs.json"}


def test_every_generated_yaml_is_a_mapping(tmp_path: Path) -> None:
    for path in write_dashboards(tmp_path):
        if path.suffix == ".yml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_a_destination_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_dashboards(tmp_path / "taken")
