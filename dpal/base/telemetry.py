"""The one catalogue of metrics, and the port through which the software reports them.

Dashboards, alerts and docs are generated from `METRICS`; nothing else defines a metric.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One number on a dashboard: name, kind, unit and meaning."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()


TRAIN_STEP = Metric("dpal_train_step", "gauge", "steps", "optimiser steps done")
TRAIN_STEPS = Metric("dpal_train_steps", "gauge", "steps", "optimiser steps of the whole run")
TRAIN_LOSS = Metric("dpal_train_loss", "gauge", "1", "loss of the last step, by term", ("term",))
TRAIN_LR = Metric("dpal_train_learning_rate", "gauge", "1", "learning rate of the last step")
TRAIN_IMAGES = Metric("dpal_train_images_total", "counter", "images", "images trained on")
TRAIN_SECONDS = Metric(
    "dpal_train_phase_seconds",
    "histogram",
    "seconds",
    "time of one step by phase: data (waiting for a batch), step, checkpoint",
    ("phase",),
)
TRAIN_ROUTER = Metric(
    "dpal_train_router_probability",
    "gauge",
    "1",
    "mean probability the router gives to the pattern it was called for",
    ("pattern",),
)
CHECKPOINT_TIME = Metric(
    "dpal_train_last_checkpoint_timestamp_seconds",
    "gauge",
    "seconds",
    "unix time of the last committed checkpoint",
)
CACHE_IMAGES = Metric("dpal_cache_images_total", "counter", "images", "images the teacher saw")
CACHE_SHARDS = Metric("dpal_cache_shards", "gauge", "shards", "shards with committed targets")
CACHE_SHARDS_TOTAL = Metric("dpal_cache_shards_wanted", "gauge", "shards", "shards to cache")
DATA_SKIPPED = Metric(
    "dpal_data_skipped_total", "counter", "samples", "samples skipped, by reason", ("reason",)
)
DECODE_FALLBACK = Metric(
    "dpal_data_decode_fallback_total",
    "counter",
    "images",
    "images the fast decoder refused and Pillow decoded",
)
STORAGE_RETRIES = Metric(
    "dpal_storage_retries_total", "counter", "requests", "storage requests that were retried"
)
STORAGE_REFETCHES = Metric(
    "dpal_storage_refetches_total",
    "counter",
    "objects",
    "objects whose bytes were damaged on the way, and whole when fetched again",
)

METRICS: tuple[Metric, ...] = (
    TRAIN_STEP,
    TRAIN_STEPS,
    TRAIN_LOSS,
    TRAIN_LR,
    TRAIN_IMAGES,
    TRAIN_SECONDS,
    TRAIN_ROUTER,
    CHECKPOINT_TIME,
    CACHE_IMAGES,
    CACHE_SHARDS,
    CACHE_SHARDS_TOTAL,
    DATA_SKIPPED,
    DECODE_FALLBACK,
    STORAGE_RETRIES,
    STORAGE_REFETCHES,
)


class Telemetry(Protocol):
    """Where numbers go; `report` sets a gauge, adds to a counter, observes in a histogram."""

    def report(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge, or add to a counter."""
        ...


class MemoryTelemetry:
    """Keeps the last value (gauges) or the sum (the rest); used by tests and as a no-op."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def report(self, metric: Metric, value: float, **labels: str) -> None:
        """Record `value`; labels must be exactly those of the catalogue."""
        key = (metric.name, *(labels[name] for name in metric.labels))
        previous = 0.0 if metric.kind == "gauge" else self.values.get(key, 0.0)
        self.values[key] = previous + value


class PrometheusTelemetry:
    """Serves the catalogue on `http://0.0.0.0:<port>/metrics` through prometheus-client.

    Args:
        port: TCP port; 0 lets the system choose (see `self.port`).
        job: value of the constant label `run` that tells runs apart.
    """

    BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

    def __init__(self, port: int, run: str) -> None:
        self.registry = CollectorRegistry()
        self._run = run
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        for metric in METRICS:
            labels = ("run", *metric.labels)
            if metric.kind == "counter":
                collector: Counter | Gauge | Histogram = Counter(
                    metric.name, metric.meaning, labels, registry=self.registry
                )
            elif metric.kind == "gauge":
                collector = Gauge(metric.name, metric.meaning, labels, registry=self.registry)
            else:
                collector = Histogram(
                    metric.name,
                    metric.meaning,
                    labels,
                    registry=self.registry,
                    buckets=self.BUCKETS,
                )
            self._collectors[metric.name] = collector
        self.server, _thread = start_http_server(port, registry=self.registry)
        self.port: int = self.server.server_port

    def report(self, metric: Metric, value: float, **labels: str) -> None:
        """Record `value`; labels must be exactly those of the catalogue."""
        child = self._collectors[metric.name].labels(run=self._run, **labels)
        if isinstance(child, Counter):
            child.inc(value)
        elif isinstance(child, Gauge):
            child.set(value)
        else:
            child.observe(value)
