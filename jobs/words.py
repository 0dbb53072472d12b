"""How methods and teachers are called in the report and in the model card."""

from pathlib import PurePath
from typing import NamedTuple

from dpal.base.recipe import Recipe
from dpal.base.teachers import (
    MobileSamTeacher,
    OnnxTeacher,
    SoliderTeacher,
    TaughtTeacher,
    Teacher,
    TimmTeacher,
)


class MethodWords(NamedTuple):
    """What a method is called.

    Attributes:
        title: its short name.
        does: ends the sentence "a student pretrained without labels by ...".
        paper: where it is described; empty for none.
    """

    title: str
    does: str
    paper: str


METHODS = {
    "dpal": MethodWords(
        "DPAL",
        "dynamic pattern alignment with frozen teachers",
        "https://arxiv.org/abs/2508.07144",
    ),
    "mse": MethodWords("feature distillation", "plain feature distillation", ""),
    "proteus": MethodWords(
        "Proteus",
        "distillation of tokens, features and masked patches",
        "https://github.com/BeSpontaneous/Proteus-pytorch",
    ),
    "tinymim": MethodWords(
        "TinyMIM",
        "distillation of attention relations",
        "https://github.com/OliverRensu/TinyMIM",
    ),
    "saip": MethodWords(
        "SAIP",
        "scale-aware self-supervision, without a teacher",
        "https://arxiv.org/abs/2503.08201",
    ),
}
PUBLISHED = {
    "path": "PATH",
    "mae": "MAE",
    "hap": "HAP",
    "pass": "PASS",
    "unihcp": "UniHCP",
    "sapiens": "Sapiens",
    "solider": "SOLIDER",
    "mobilesam": "MobileSAM",
}


def method_words(recipe: Recipe) -> MethodWords:
    """What the recipe's method is called."""
    return METHODS[recipe.method.kind]


def teacher_words(teacher: Teacher) -> str:
    """A teacher in a few words: what it is, and where it is tapped."""
    if isinstance(teacher, TaughtTeacher):
        return "a small ViT taught on the labels of the synthetic persons"
    if isinstance(teacher, TimmTeacher):
        return f"{teacher.name}, tap {teacher.tap}"
    file = PurePath(teacher.weights).name
    if isinstance(teacher, OnnxTeacher):
        return f"the ONNX network {file}"
    words = [f"{PUBLISHED[teacher.kind]} ({file})"]
    if not isinstance(teacher, MobileSamTeacher):
        words.append(f"tap {teacher.tap}")
    if isinstance(teacher, SoliderTeacher):
        words.append(f"semantic weight {teacher.semantic_weight:g}")
    return ", ".join(words)


def teachers_words(recipe: Recipe) -> list[str]:
    """Every teacher that the student learns from."""
    return [teacher_words(teacher) for teacher in recipe.aligned_teachers]
