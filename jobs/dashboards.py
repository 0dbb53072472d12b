"""`dpal dashboards DEST`: everything that Prometheus and Grafana need to watch a run."""

import os
from pathlib import Path

from cluster.monitoring import alerts, grafana, scrape
from dpal.base.errors import StorageError

GRAFANA_FOLDER = "/var/lib/grafana/dashboards"  # where docker/compose.yaml mounts `grafana/`
PROMETHEUS_URL = "http://prometheus:9090"


def write_dashboards(dest: str | Path) -> tuple[Path, ...]:
    """Write the generated files below `dest` and return their paths; a rerun changes no byte.

    `targets/runs.json` is the user's to edit: it is written once and then left alone.

    Raises:
        StorageError: `dest` cannot be written.
    """
    folder = Path(dest)
    files = {
        "prometheus.yml": scrape.prometheus_config(),
        "prometheus-kubernetes.yml": scrape.kubernetes_config(),
        "rules.yml": alerts.rules(),
        "grafana/dpal.json": grafana.dashboard(),
        "provisioning/datasources/prometheus.yml": grafana.datasource(PROMETHEUS_URL),
        "provisioning/dashboards/dpal.yml": grafana.provider(GRAFANA_FOLDER),
    }
    if not (folder / "targets" / "runs.json").exists():
        files["targets/runs.json"] = scrape.targets()
    try:
        for name, text in files.items():
            _write(folder / name, text)
    except OSError as error:
        raise StorageError(f"cannot write to {str(folder)!r}: {error.strerror}") from None
    return tuple(folder / name for name in files)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text)
    aside.replace(path)
