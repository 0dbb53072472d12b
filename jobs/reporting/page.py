"""The report as one HTML page that needs nothing else: pictures, styles, values are inside."""

import base64
import io
from html import escape
from importlib.resources import files

from PIL import Image

from jobs.reporting.data import ReportInputs, Score
from jobs.reporting.numbers import number_of, tiles
from jobs.reporting.training import training_section
from jobs.words import method_words, teachers_words

SECURITY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
DIGEST_META = "dpal-inputs"
TASK_NAMES = {"reid": "Person re-identification", "parsing": "Human parsing"}


def asset(name: str) -> str:
    """Text of a file of `jobs/page/`."""
    return files("jobs").joinpath("page", name).read_text()


def page(inputs: ReportInputs) -> str:
    """The whole page."""
    name = escape(inputs.recipe.name)
    sections = {
        "results": ("Results", _results(inputs)),
        "views": ("What the student sees", _pictures(inputs, "views", "composites")),
        "features": ("What it learned", _pictures(inputs, "masks", "features", "similarity")),
        "training": ("Training", training_section(inputs)),
        "use": ("Use the backbone", _use(inputs)),
        "recipe": ("Recipe", _recipe(inputs)),
    }
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _body) in sections.items())
    bodies = "".join(
        f'<section id="{key}"><h2>{title}</h2>{body}</section>'
        for key, (title, body) in sections.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">'
        f'<meta name="{DIGEST_META}" content="{inputs.digest}">'
        f'<title>{name} · dpal report</title><link rel="icon" href="data:,">'
        f"<style>{asset('report.css')}</style></head><body><main>"
        f'<header><p class="eyebrow">dpal pretraining report</p><h1>{name}</h1>'
        f'<p class="lead">{_lead(inputs)}</p></header><nav>{links}</nav>'
        f"{tiles(inputs)}{bodies}"
        f"<footer>Everything on this page is inside this file; it opens without a network. "
        f"Recipe digest <code>{inputs.recipe.digest()}</code>.</footer>"
        f"</main><script>{asset('report.js')}</script></body></html>\n"
    )


def _lead(inputs: ReportInputs) -> str:
    recipe, history = inputs.recipe, inputs.history
    method, teachers = method_words(recipe), [escape(words) for words in teachers_words(recipe)]
    learned = f" from <b>{'</b> and <b>'.join(teachers)}</b>" if teachers else ""
    steps = f"{history.steps[-1].step:,} steps" if history.steps else "no step yet"
    state = "" if history.finished or not history.steps else " The run is not finished."
    return (
        f"A <b>{escape(recipe.student.title)}</b> backbone for images of persons "
        f"({recipe.student.height} × {recipe.student.width} pixels), pretrained without labels by "
        f"{method.does}{learned} (<b>{method.title}</b>): {steps} of "
        f"{recipe.train.global_batch:,} samples.{state}"
    )


def _results(inputs: ReportInputs) -> str:
    if not inputs.scores:
        return _missing("No scores yet: run <code>dpal evaluate</code> on this recipe.")
    details = [score for score in inputs.scores if score.is_detail]
    more = f"<details><summary>Every class</summary>{_table(details)}</details>" if details else ""
    learned = len(inputs.recipe.aligned_teachers)
    teacher = "the network it learned from" if learned else "a network for comparison"
    if learned > 1:
        teacher = "the best of its teachers in each score"
    return (
        '<p class="intro">The backbones stay frozen; each task reads their features. '
        "<b>Untrained</b> is the same student with its random start weights, <b>teacher</b> "
        f"{teacher}. The last column tells how much of the way between these two the "
        "student has come.</p>"
        f'<div class="box">{_table([s for s in inputs.scores if not s.is_detail])}{more}</div>'
    )


def _table(scores: list[Score]) -> str:
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.task, score.data), []).append(score)
    bodies = "".join(
        f'<tbody><tr class="group"><th colspan="5">{escape(TASK_NAMES.get(task, task))} on '
        f"{escape(data)}</th></tr>{''.join(map(_score_row, rows))}</tbody>"
        for (task, data), rows in groups.items()
    )
    return (
        '<table class="scores"><thead><tr><th>%</th><th>Untrained</th><th>Student</th>'
        f"<th>Teacher</th><th>Way covered</th></tr></thead>{bodies}</table>"
    )


def _score_row(score: Score) -> str:
    closed = "–" if score.gap_closed is None else f"{score.gap_closed:.0f}&nbsp;%"
    return (
        f"<tr><td>{escape(score.metric.replace('_', ' '))}</td>"
        f"<td>{number_of(score.untrained)}</td>"
        f'<td class="best">{number_of(score.student)}</td><td>{number_of(score.teacher)}</td>'
        f"<td>{closed}</td></tr>"
    )


def _pictures(inputs: ReportInputs, *kinds: str) -> str:
    chosen = [preview for preview in inputs.previews if preview.kind in kinds]
    if not chosen:
        reason = escape(inputs.preview_problem) or "run <code>dpal preview</code> on this recipe"
        return _missing(f"No pictures yet: {reason}.")
    return "".join(
        f'<figure class="plate"><div class="scroll"><img alt="{escape(preview.title, quote=True)}" '
        f'src="{_data_uri(preview.file.read_bytes())}"></div><figcaption>'
        f"<b>{escape(preview.title)}.</b> {escape(preview.caption)}</figcaption></figure>"
        for preview in chosen
    )


def _data_uri(png: bytes) -> str:
    """A picture as a WebP data URI: a quarter of the PNG's bytes."""
    packed = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(packed, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def _use(inputs: ReportInputs) -> str:
    export = inputs.export
    if export is None:
        return _missing("Nothing exported yet: run <code>dpal export</code> on this recipe.")
    vit = inputs.recipe.student.family == "vit"
    last = "tokens = model.forward_features(pixels)   # [1, 1 + N, D]: CLS, then patch tokens"
    if not vit:
        last = "vector, tokens = features(model, pixels)   # [1, D], and [1, N, D] at stride 16"
    code = (
        "import sys\n"
        f"sys.path.insert(0, {export.folder!r})\n"
        f"from load import {'load' if vit else 'features, load'}   # needs timm, nothing of dpal\n"
        "from PIL import Image\n\n"
        "model, transform = load()\n"
        'pixels = transform(Image.open("person.jpg").convert("RGB"))[None]\n'
        f"{last}"
    )
    onnx = " An ONNX graph lies beside it." if export.onnx else ""
    return (
        f'<p class="intro">The export of step {export.step:,} is a folder of '
        f"{export.num_bytes / 1e6:.1f} MB with timm's own tensor names. It was loaded back and "
        f"compared on real views: no feature differs by more than {export.max_abs_error:.1e}."
        f'{onnx}</p><div class="box"><pre>{escape(code)}</pre></div>'
    )


def _recipe(inputs: ReportInputs) -> str:
    return (
        '<p class="intro">Every value of the run, defaults included; credentials are left out.</p>'
        '<details class="box"><summary>Resolved recipe</summary>'
        f"<pre>{escape(inputs.recipe.to_yaml())}</pre></details>"
    )


def _missing(sentence: str) -> str:
    return f'<p class="missing">{sentence}</p>'
