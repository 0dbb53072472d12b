"""The headline tiles of the report."""

import math
from html import escape
from statistics import median

from jobs.reporting.data import ReportInputs, Score

HEADLINES = {"reid": ("map", "re-ID mAP"), "parsing": ("miou", "parsing mIoU")}


def tiles(inputs: ReportInputs) -> str:
    """A row with one tile a task, then a row with size, speed and length of the run."""
    tasks = "".join(_task_tile(score) for score in _headline_scores(inputs.scores))
    facts = "".join(_facts(inputs))
    return "".join(f'<div class="tiles">{row}</div>' for row in (tasks, facts) if row)


def _facts(inputs: ReportInputs) -> list[str]:
    history, parts = inputs.history, []
    if history.num_student:
        decoder = f"+ {history.num_decoder / 1e6:.1f} M in the decoder, discarded"
        parts.append(_tile("student parameters", f"{history.num_student / 1e6:.2f}", "M", decoder))
    rates = [step.images_per_s for step in history.steps if math.isfinite(step.images_per_s)]
    if rates:
        world = history.world_sizes[-1] if history.world_sizes else 1
        processes = f"median, on {world} process{'es' if world > 1 else ''}"
        parts.append(_tile("training speed", f"{median(rates):,.0f}", "images/s", processes))
    if history.steps:
        parts.append(_length_tile(inputs))
    return parts


def number_of(score: float | None) -> str:
    """A score in percent with one decimal; a dash when it is absent."""
    return "–" if score is None else f"{score:.1f}"


def _headline_scores(scores: tuple[Score, ...]) -> list[Score]:
    chosen = []
    for task, (metric, _name) in HEADLINES.items():
        rows = [score for score in scores if score.task == task]
        preferred = [score for score in rows if score.metric.lower() == metric]
        chosen += (preferred or rows)[:1]
    return [score for score in chosen if score.student is not None]


def _task_tile(score: Score) -> str:
    preferred, label = HEADLINES[score.task]
    name = label if score.metric.lower() == preferred else f"{score.task} {score.metric}"
    assert score.student is not None, "chosen by _headline_scores"
    known = [
        value for value in (score.untrained, score.student, score.teacher) if value is not None
    ]
    top = max(*known, 1e-9) * 1.08
    start = (
        f'<u style="left:{100 * score.untrained / top:.1f}%"></u>'
        if score.untrained is not None
        else ""
    )
    goal = (
        f'<u style="left:{100 * score.teacher / top:.1f}%"></u>'
        if score.teacher is not None
        else ""
    )
    return (
        f'<div class="tile wide"><div class="name">{escape(name)}</div>'
        f'<div class="value">{score.student:.1f}<small>&nbsp;%</small></div>'
        f'<div class="track"><i style="width:{100 * score.student / top:.1f}%"></i>{start}{goal}'
        f'</div><div class="ends"><span>untrained {number_of(score.untrained)}</span>'
        f"<span>teacher {number_of(score.teacher)}</span></div></div>"
    )


def _length_tile(inputs: ReportInputs) -> str:
    history = inputs.history
    samples = history.steps[-1].step * inputs.recipe.train.global_batch
    resumed = len(history.world_sizes) - 1
    more = f"{samples:,} samples seen"
    if resumed > 0:
        more += f", resumed {resumed} time{'s' if resumed > 1 else ''}"
    return _tile("length", f"{history.steps[-1].step:,}", "steps", more)


def _tile(name: str, value: str, unit: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">'
        f"{escape(value)}<small> {escape(unit)}</small></div>"
        f'<div class="more">{escape(more)}</div></div>'
    )
