"""The README.md of an export: what the model is, what it was trained on, how to load it."""

from collections.abc import Sequence

from dpal.base.recipe import Recipe
from dpal.export import Parity
from jobs.reporting.data import Score
from jobs.reporting.numbers import number_of
from jobs.words import method_words, teachers_words

_VIT_USE = """\
    from load import load                     # needs timm only
    model, transform = load()
    pixels = transform(image)[None]           # a PIL image of one person
    tokens = model.forward_features(pixels)   # [1, 1 + N, D]: global token, then patch tokens
"""
_PYRAMID_USE = """\
    from load import features, load                   # needs timm only
    model, transform = load()
    pixels = transform(image)[None]                   # a PIL image of one person
    vector, tokens = features(model, pixels)          # [1, D], and [1, N, D] at stride 16
    last = model.forward_features(pixels)             # the network's own last map
"""
_HEADS = """
The last block has another number of attention heads than the others, which a timm configuration
cannot say. `load.py` sets it; without it the features are wrong.
"""


def model_card(
    recipe: Recipe,
    step: int,
    scores: Sequence[Score],
    parity: Parity,
    num_bytes: int,
    num_images: int,
) -> str:
    """Markdown with the front matter that model hubs read."""
    student, method = recipe.student, method_words(recipe)
    link = f"\n([{method.title}]({method.paper}))" if method.paper else ""
    use = _VIT_USE if student.family == "vit" else _PYRAMID_USE
    heads = _HEADS if student.family == "vit" and student.heads == "paper" else ""
    return f"""---
library_name: timm
tags: [image-feature-extraction, human-centric]
---
# {recipe.name}

A {student.title} backbone for images of persons, {student.height} × {student.width} pixels,
pretrained without labels by {method.does}{link}.

{use}{heads}
| | |
|---|---|
| images | {num_images:,}, from {_source(recipe)} |
| method | {method.title} |
| teacher | {_teacher(recipe)} |
| training | {step:,} steps of {recipe.train.global_batch:,} samples |
| weights | {num_bytes / 1e6:.1f} MB, float32 |
| check | {parity.num_images} views, largest feature difference {parity.max_abs_error:.1e} |
{_scores(scores)}
## Licence

The files here carry no licence of their own. The weights derive from {_origins(recipe)}
named above, whose terms may bind their use; check them before you pass the weights on.
"""


def _source(recipe: Recipe) -> str:
    if recipe.data.images == ("synthetic",):
        return "synthetic persons drawn by `dpal`"
    return "the image set of the recipe"


def _teacher(recipe: Recipe) -> str:
    return "; ".join(teachers_words(recipe)) or "none"


def _origins(recipe: Recipe) -> str:
    teachers = ("", "and the teacher", "and the teachers")[min(len(recipe.aligned_teachers), 2)]
    return f"the images {teachers}".strip()


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return "\nThe backbone has not been evaluated.\n"
    rows = "\n".join(
        f"| {score.task} | {score.metric} | "
        f"{' | '.join(map(number_of, (score.untrained, score.student, score.teacher)))} |"
        for score in scores
        if not score.is_detail
    )
    return (
        "\nScores of frozen features, in percent:\n\n"
        "| task | metric | untrained | this model | teacher |\n|---|---|---|---|---|\n"
        f"{rows}\n"
    )
