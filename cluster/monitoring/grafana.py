"""The Grafana dashboard as JSON, and the two files that make a Grafana load it by itself."""

import json
from typing import Any

import yaml

from cluster.monitoring.panels import Panel, panels

COLUMNS, WIDTH, HEIGHT = 3, 8, 8  # Grafana's grid is 24 wide
SCHEMA_VERSION = 39
SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> str:
    """The dashboard; the same catalogue gives the same bytes."""
    model = {
        "uid": "dpal",
        "title": "dpal",
        "tags": ["dpal"],
        "timezone": "browser",
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels())],
    }
    return json.dumps(model, indent=2) + "\n"


def datasource(url: str) -> str:
    """Provisioning file that points Grafana at the Prometheus of `url`."""
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "uid": "prometheus",
        "access": "proxy",
        "url": url,
        "isDefault": True,
    }
    return yaml.safe_dump({"apiVersion": 1, "datasources": [source]}, sort_keys=False)


def provider(folder: str) -> str:
    """Provisioning file that has Grafana load the dashboards of `folder`."""
    entry = {"name": "dpal", "type": "file", "options": {"path": folder}}
    return yaml.safe_dump({"apiVersion": 1, "providers": [entry]}, sort_keys=False)


def _source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}


def _run_variable() -> dict[str, Any]:
    query = 'label_values({__name__=~"dpal_.+"}, run)'
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    place = {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": "\n".join(
            f"{metric.name} [{metric.unit}]: {metric.meaning}" for metric in panel.metrics
        ),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }
