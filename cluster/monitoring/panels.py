"""What the dashboard shows: title, unit and PromQL of every panel, made from the catalogue.

`$run` is the dashboard's variable; `$__rate_interval` is Grafana's own. A panel's description is
the meaning that the catalogue gives to its metrics.
"""

from typing import NamedTuple

from dpal.base import telemetry as t

RUN = 'run=~"$run"'
WINDOW = "[$__rate_interval]"


class Query(NamedTuple):
    """One PromQL expression and how its series are named."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """One panel; `unit` is a Grafana unit id."""

    title: str
    unit: str
    metrics: tuple[t.Metric, ...]
    queries: tuple[Query, ...]


def panels() -> tuple[Panel, ...]:
    """All panels in reading order: is it going, is it learning, is it fast, is data lost."""
    return (*_progress(), *_learning(), *_speed(), *_cache(), *_losses_of_data())


def _value(metric: t.Metric) -> str:
    return f"{metric.name}{{{RUN}}}"


def _rate(metric: t.Metric, *by: str, suffix: str = "") -> str:
    return f"sum by ({', '.join(('run', *by))}) (rate({metric.name}{suffix}{{{RUN}}}{WINDOW}))"


def _progress() -> tuple[Panel, ...]:
    return (
        Panel(
            "Training done",
            "percentunit",
            (t.TRAIN_STEP, t.TRAIN_STEPS),
            (Query(f"{_value(t.TRAIN_STEP)} / {_value(t.TRAIN_STEPS)}", "{{run}}"),),
        ),
        Panel(
            "Age of the last checkpoint",
            "s",
            (t.CHECKPOINT_TIME,),
            (Query(f"time() - {_value(t.CHECKPOINT_TIME)}", "{{run}}"),),
        ),
    )


def _learning() -> tuple[Panel, ...]:
    return (
        Panel(
            "Loss by term",
            "short",
            (t.TRAIN_LOSS,),
            (Query(_value(t.TRAIN_LOSS), "{{run}} {{term}}"),),
        ),
        Panel(
            "Learning rate",
            "sci",
            (t.TRAIN_LR,),
            (Query(_value(t.TRAIN_LR), "{{run}}"),),
        ),
        Panel(
            "Router probability by pattern",
            "percentunit",
            (t.TRAIN_ROUTER,),
            (Query(_value(t.TRAIN_ROUTER), "{{run}} {{pattern}}"),),
        ),
    )


def _speed() -> tuple[Panel, ...]:
    seconds = t.TRAIN_SECONDS
    quantile = _rate(seconds, "le", "phase", suffix="_bucket")
    return (
        Panel(
            "Images trained on, per second",
            "short",
            (t.TRAIN_IMAGES,),
            (Query(_rate(t.TRAIN_IMAGES), "{{run}}"),),
        ),
        Panel(
            "Where the time goes, by phase",
            "percentunit",
            (seconds,),
            (
                Query(
                    f"{_rate(seconds, 'phase', suffix='_sum')} / on (run) group_left () "
                    f"{_rate(seconds, suffix='_sum')}",
                    "{{run}} {{phase}}",
                ),
            ),
        ),
        Panel(
            "Time of a step, 95th percentile, by phase",
            "s",
            (seconds,),
            (Query(f"histogram_quantile(0.95, {quantile})", "{{run}} {{phase}}"),),
        ),
    )


def _cache() -> tuple[Panel, ...]:
    done, wanted = _value(t.CACHE_SHARDS), _value(t.CACHE_SHARDS_TOTAL)
    return (
        Panel(
            "Shards with targets",
            "short",
            (t.CACHE_SHARDS, t.CACHE_SHARDS_TOTAL),
            (Query(done, "{{run}} done"), Query(wanted, "{{run}} wanted")),
        ),
        Panel(
            "Time until all shards have targets",
            "s",
            (t.CACHE_SHARDS, t.CACHE_SHARDS_TOTAL),
            (Query(f"({wanted} - {done}) / (deriv({done}[15m]) > 0)", "{{run}}"),),
        ),
        Panel(
            "Images the teacher saw, per second",
            "short",
            (t.CACHE_IMAGES,),
            (Query(_rate(t.CACHE_IMAGES), "{{run}}"),),
        ),
    )


def _losses_of_data() -> tuple[Panel, ...]:
    return (
        Panel(
            "Samples skipped, by reason",
            "short",
            (t.DATA_SKIPPED,),
            (Query(f"sum by (run, reason) ({_value(t.DATA_SKIPPED)})", "{{run}} {{reason}}"),),
        ),
        Panel(
            "Retries and fallbacks, per second",
            "short",
            (t.STORAGE_RETRIES, t.STORAGE_REFETCHES, t.DECODE_FALLBACK),
            (
                Query(_rate(t.STORAGE_RETRIES), "{{run}} storage retries"),
                Query(_rate(t.STORAGE_REFETCHES), "{{run}} damaged on the way"),
                Query(_rate(t.DECODE_FALLBACK), "{{run}} decoder fallbacks"),
            ),
        ),
    )
