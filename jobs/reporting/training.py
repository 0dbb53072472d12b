"""The training section of the report: losses, learning rate, router, where the time went."""

import math

from jobs.reporting.chart import Series, line_chart, split_bar
from jobs.reporting.data import PATTERNS, History, ReportInputs
from jobs.words import teachers_words

TERM_NOTES = {
    "dpal": {
        "identity": "Mean squared error of the decoded CLS tokens to the teacher's.",
        "shape": "Squared error of the decoded patch tokens, weighted by the shape mask.",
        "relation": "KL divergence of the composite's affinities, teacher to student.",
        "router": "Cross entropy of the router against the pattern it was called for.",
        "expert": "Penalty on the size of the generated experts.",
    },
    "mse": {
        "identity": "Mean squared error of the projected CLS token to the teacher's.",
        "shape": "Mean squared error of the projected patch tokens.",
    },
    "proteus": {
        "token": "Mean squared error of the projected CLS token to the teacher's.",
        "feature": "Mean squared error of all tokens, CLS and patches.",
        "patch": "Mean squared error of patches that the student did not see.",
    },
    "tinymim": {
        "qk": "KL divergence of the query-key relations, teacher to student.",
        "vv": "KL divergence of the value-value relations, teacher to student.",
    },
    "saip": {
        "representation": "Cross entropy of prototypes across views and scales.",
        "attention": "KL divergence of the attention relations to the averaged student's.",
        "reconstruction": "Squared error of the masked patches' normalised pixels.",
        "instance": "Cross entropy of finding the whole person in a pasted scene.",
        "region": "Cross entropy of finding the local crop in a pasted scene.",
    },
}
DIAGNOSTICS = {
    "router_entropy": (
        "Router entropy",
        "In nats; 1.1 is a router of three patterns that cannot tell them apart.",
    ),
    "expert_similarity": (
        "Expert similarity",
        "Mean cosine between two experts of an image; 1 means that they are the same.",
    ),
}


def training_section(inputs: ReportInputs) -> str:
    """Charts over the optimiser steps, then the router table; a sentence when nothing ran."""
    history = inputs.history
    if not history.steps:
        return '<p class="missing">No training step yet: run <code>dpal train</code>.</p>'
    kind = inputs.recipe.method.kind
    charts = [_total(history), *_terms(history, kind), _teachers(inputs), _router(history)]
    charts += [*_diagnostics(history), _rate(history), _speed(history), _time_split(history)]
    return (
        '<p class="intro">Move the pointer over a chart to read its values. Where many steps were '
        "logged, a line is the mean of neighbouring steps and the band their range.</p>"
        f'<div class="grid2">{"".join(charts)}</div>{_router_table(history.routing)}'
    )


def _column(history: History, name: str) -> list[float]:
    return [float(getattr(step, name)) for step in history.steps]


def _logged(history: History, name: str) -> list[float]:
    return [step.terms.get(name, math.nan) for step in history.steps]


def _xs(history: History) -> list[float]:
    return [float(step.step) for step in history.steps]


def _total(history: History) -> str:
    line = Series("total", _column(history, "loss"), 1)
    note = "Weighted sum of the terms below; what the optimiser minimises."
    return line_chart("Loss", note, _xs(history), [line])


def _terms(history: History, kind: str) -> list[str]:
    """A chart for every term; a term that was 0 throughout had no weight."""
    charts = []
    for index, (term, note) in enumerate(TERM_NOTES[kind].items()):
        values = _logged(history, term)
        if any(values):
            title = f"{term.upper() if len(term) == 2 else term.capitalize()} term"
            charts.append(line_chart(title, note, _xs(history), [Series(term, values, index + 2)]))
    return charts


def _teachers(inputs: ReportInputs) -> str:
    """The alignment loss of each of several teachers."""
    rows = [step.lists.get("teacher_loss", ()) for step in inputs.history.steps]
    count = max(map(len, rows))
    names = teachers_words(inputs.recipe)
    if not count or count != len(names):
        return ""
    lines = [
        Series(name, [row[index] if row else math.nan for row in rows], index % 5 + 2)
        for index, name in enumerate(names)
    ]
    note = "Alignment loss of every teacher, before any is dropped."
    return line_chart("Teachers", note, _xs(inputs.history), lines)


def _router(history: History) -> str:
    rows = [step.lists.get("router_probability", ()) for step in history.steps]
    count = max(map(len, rows))
    lines = [
        Series(pattern, [row[index] if row else math.nan for row in rows], index + 2)
        for index, pattern in enumerate(PATTERNS[:count])
    ]
    guess = {2: "one half", 3: "one third"}.get(count, "")
    note = f"Mean probability given to the right pattern; {guess} is a guess."
    return line_chart("Router", note, _xs(history), lines, top=1.0)


def _diagnostics(history: History) -> list[str]:
    return [
        line_chart(title, note, _xs(history), [Series(title.lower(), _logged(history, name), 1)])
        for name, (title, note) in DIAGNOSTICS.items()
    ]


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
    patterns = PATTERNS[: len(routing)]
    head = "".join(f"<th>{pattern}</th>" for pattern in patterns)
    rows = "".join(
        f"<tr><th>{called}</th>"
        + "".join(
            f'<td class="heat" style="--share:{60 * value:.0f}%">{value:.2f}</td>' for value in row
        )
        + "</tr>"
        for called, row in zip(patterns, routing, strict=True)
    )
    return (
        "<h3>Which pattern the router believes it decodes</h3>"
        '<p class="intro">Rows: the pattern the decoder was called for. Columns: the mean '
        "probability of each pattern over the last logged steps. A router that tells them apart "
        "has its mass on the diagonal.</p>"
        f'<div class="box narrow"><table class="router"><thead><tr><th>called for</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
