"""Alert rules for Prometheus, made from the catalogue."""

from typing import NamedTuple

import yaml

from dpal.base import telemetry as t

MAX_DATA_SHARE = 0.3  # of a step's time spent on waiting for a batch
MAX_CHECKPOINT_AGE_S = 3600
MAX_SKIPS = 10  # in a quarter of an hour
MAX_RETRIES_PER_S = 0.1
UNFINISHED = f"{t.TRAIN_STEP.name} < {t.TRAIN_STEPS.name}"


class Alert(NamedTuple):
    """One rule; `wait` is how long it must hold, `todo` what a person does first."""

    name: str
    severity: str
    wait: str
    expr: str
    summary: str
    todo: str


def alerts() -> tuple[Alert, ...]:
    """All alerts; every one carries the label `run`."""
    return (*_of_the_run(), *_of_the_loss(), *_of_the_data())


def rules() -> str:
    """The rules file for Prometheus; the same catalogue gives the same bytes."""
    entries = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.wait,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "description": alert.todo},
        }
        for alert in alerts()
    ]
    groups = {"groups": [{"name": "dpal", "rules": entries}]}
    return yaml.safe_dump(groups, sort_keys=False, width=100)


def _of_the_run() -> tuple[Alert, ...]:
    age = f"time() - {t.CHECKPOINT_TIME.name} > {MAX_CHECKPOINT_AGE_S}"
    return (
        Alert(
            "DpalRunStalled",
            "critical",
            "5m",
            f"changes({t.TRAIN_STEP.name}[10m]) == 0 and {UNFINISHED}",
            "{{ $labels.run }} has made no step for 10 minutes",
            "Read the job's log; cancel and submit it again: it goes on from its checkpoint.",
        ),
        Alert(
            "DpalNoCheckpoint",
            "critical",
            "5m",
            f"{age} and on (run, instance) ({UNFINISHED})",
            "{{ $labels.run }} has committed no checkpoint for an hour",
            "Is the run folder full or read-only? Is train.checkpoint_every too large?",
        ),
        Alert(
            "DpalNeverCheckpointed",
            "critical",
            "1h",
            f"({UNFINISHED}) unless on (run, instance) {t.CHECKPOINT_TIME.name}",
            "{{ $labels.run }} has run for an hour without a first checkpoint",
            "Lower train.checkpoint_every: a lost node would cost everything so far.",
        ),
    )


def _of_the_loss() -> tuple[Alert, ...]:
    loss = t.TRAIN_LOSS.name
    return (
        Alert(
            "DpalLossNotFinite",
            "critical",
            "0m",
            f"{loss} != {loss} or abs({loss}) == Inf",  # NaN alone differs from itself
            "the {{ $labels.term }} loss of {{ $labels.run }} is not a finite number",
            "Cancel the job; go back to the last good checkpoint with a lower train.lr.",
        ),
        Alert(
            "DpalLossAbsent",
            "warning",
            "10m",
            f"{t.TRAIN_STEP.name} > 0 unless on (run, instance) {loss}",
            "{{ $labels.run }} makes steps but reports no loss",
            "Look at events.jsonl of the run folder; is train.log_every too large?",
        ),
    )


def _of_the_data() -> tuple[Alert, ...]:
    waited = f'sum by (run) (rate({t.TRAIN_SECONDS.name}_sum{{phase="data"}}[10m]))'
    all_phases = f"sum by (run) (rate({t.TRAIN_SECONDS.name}_sum[10m]))"
    skipped = f"sum by (run, reason) (increase({t.DATA_SKIPPED.name}[15m]))"
    retried = f"sum by (run) (rate({t.STORAGE_RETRIES.name}[10m]))"
    return (
        Alert(
            "DpalDataWait",
            "warning",
            "10m",
            f"{waited} / {all_phases} > {MAX_DATA_SHARE}",
            "{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of its time",
            "Raise train.loader_threads or train.prefetch, or move the shards nearer.",
        ),
        Alert(
            "DpalSamplesSkipped",
            "warning",
            "0m",
            f"{skipped} > {MAX_SKIPS}",
            "{{ $labels.run }} skips samples: {{ $labels.reason }}",
            "Run dpal audit on the shards and the target cache.",
        ),
        Alert(
            "DpalStorageRetries",
            "warning",
            "10m",
            f"{retried} > {MAX_RETRIES_PER_S}",
            "{{ $labels.run }} retries many storage requests",
            "Look at the store; lower the number of clients or raise storage.timeout_s.",
        ),
    )
