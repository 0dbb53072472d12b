"""The training section of the report: losses, learning rate, router, where the time went."""

import math

from jobs.report_chart import Series, line_chart, split_bar
from jobs.report_data import LOSS_TERMS, PATTERNS, History, ReportInputs

TERM_NOTES = {
    "identity": "Mean squared error of the decoded CLS tokens to the teacher's.",
    "shape": "Squared error of the decoded patch tokens, weighted by the shape mask.",
    "relation": "KL divergence of the composite's token-to-token affinities.",
    "router": "Cross entropy of the router against the pattern it was called for.",
    "expert": "Penalty on the size of the generated experts.",
}


def training_section(inputs: ReportInputs) -> str:
    """Charts over the optimiser steps, then the router table; a sentence when nothing ran."""
    history = inputs.history
    if not history.steps:
        return '<p class="missing">No training step yet: run <code>dpal train</code>.</p>'
    charts = [_total(history), *_terms(history), _router(history), _rate(history)]
    charts += [_speed(history), _time_split(history)]
    return (
        '<p class="intro">Move the pointer over a chart to read its values. Where many steps were '
        "logged, a line is the mean of neighbouring steps and the band their range.</p>"
        f'<div class="grid2">{"".join(charts)}</div>{_router_table(history.routing)}'
    )


def _column(history: History, name: str) -> list[float]:
    return [float(getattr(step, name)) for step in history.steps]


def _xs(history: History) -> list[float]:
    return [float(step.step) for step in history.steps]


def _total(history: History) -> str:
    line = Series("total", _column(history, "loss"), 1)
    note = "Weighted sum of the terms below; what the optimiser minimises."
    return line_chart("Loss", note, _xs(history), [line])


def _terms(history: History) -> list[str]:
    xs = _xs(history)
    return [
        line_chart(
            f"{term.capitalize()} term",
            TERM_NOTES[term],
            xs,
            [Series(term, _column(history, term), colour)],
        )
        for term, colour in zip(LOSS_TERMS, (2, 3, 4, 5, 6), strict=True)
    ]


def _router(history: History) -> str:
    lines = [
        Series(pattern, [step.router_probability[index] for step in history.steps], index + 2)
        for index, pattern in enumerate(PATTERNS)
    ]
    note = "Mean probability given to the right pattern; one third is a guess."
    return line_chart("Router", note, _xs(history), lines, top=1.0)


def _rate(history: History) -> str:
    line = Series("learning rate", _column(history, "lr"), 1)
    note = "Warm-up, then cosine decay."
    return line_chart("Learning rate", note, _xs(history), [line], from_zero=True)


def _speed(history: History) -> str:
    line = Series("images/s", _column(history, "images_per_s"), 1)
    note = "Samples that went through all processes in one second."
    return line_chart("Throughput, images/s", note, _xs(history), [line], from_zero=True)


def _time_split(history: History) -> str:
    """Shares of a mean logged step and of the commits, spread over the steps they cover."""
    rows = [s for s in history.steps if math.isfinite(s.step_s) and math.isfinite(s.data_s)]
    if not rows:
        return ""
    data = sum(step.data_s for step in rows) / len(rows)
    compute = sum(step.step_s for step in rows) / len(rows)
    commits = history.checkpoint_seconds
    checkpoint = sum(commits) / max(history.steps[-1].step, 1)
    shares = [
        ("forward, backward, optimiser", compute, f"{1e3 * compute:,.0f} ms a step", 1),
        ("waiting for data", data, f"{1e3 * data:,.1f} ms a step", 2),
        ("checkpoints", checkpoint, f"{sum(commits):,.2f} s in {len(commits)} commits", 4),
    ]
    return split_bar("Where the time goes", "Mean over the logged steps.", shares)


def _router_table(routing: tuple[tuple[float, ...], ...]) -> str:
    if not routing:
        return ""
    head = "".join(f"<th>{pattern}</th>" for pattern in PATTERNS)
    rows = "".join(
        f"<tr><th>{called}</th>"
        + "".join(
            f'<td class="heat" style="--share:{60 * value:.0f}%">{value:.2f}</td>' for value in row
        )
        + "</tr>"
        for called, row in zip(PATTERNS, routing, strict=True)
    )
    return (
        "<h3>Which pattern the router believes it decodes</h3>"
        '<p class="intro">Rows: the pattern the decoder was called for. Columns: the mean '
        "probability of each pattern over the last logged steps. A router that tells them apart "
        "has its mass on the diagonal.</p>"
        f'<div class="box narrow"><table class="router"><thead><tr><th>called for</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
