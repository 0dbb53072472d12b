"""Recipes that make no sense are refused when they are read, in one sentence that names the key."""

from typing import Any

import pytest

from dpal.base.config import explain, resolve_recipe
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe

from made_task import TEACHER, made_recipe

BLOCK = {**TEACHER, "tap": "block9"}
ONNX = {"kind": "onnx", "weights": "a.onnx", "global_output": "g", "dense_output": "d"}
SIZE = {"height": 128, "width": 64}

# (what is refused, the sections that do it), each with the words that the sentence must hold
REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("no such method", {"method": "protus"}, ("method.kind=protus", "saip", "'proteus'")),
    ("a method without a kind", {"method": {"qk": 2}}, ("'method.kind' is required", "tinymim")),
    ("a number as method", {"method": 3}, ("method=3", "section")),
    (
        "another method's key",
        {"method": {"kind": "mse", "mask_ratio": 0.3}},
        ("'method.mask_ratio'", "identity"),
    ),
    ("no such teacher", {"teacher": {"kind": "tim"}}, ("teacher.kind=tim", "'timm'")),
    (
        "another teacher's key",
        {"teacher": {**ONNX, "tap": "norm"}},
        ("'teacher.tap'", "dense_output"),
    ),
    ("no teacher", {"teacher": None}, ("method.kind=dpal", "saip")),
    ("a number without end", {"train": {"lr": float("inf")}}, ("train.lr=inf", "finite")),
    ("no number", {"storage": {"copies_gb": float("nan")}}, ("storage.copies_gb=nan", "finite")),
    (
        "a teacher beside none",
        {"teacher": None, "more_teachers": [TEACHER], "method": "saip"},
        ("needs a teacher",),
    ),
    (
        "one teacher twice",
        {"more_teachers": [TEACHER], "loss": {"targets": "standardised"}},
        ("more_teachers.0", "differ"),
    ),
    (
        "dropping by losses of unlike scale",
        {"more_teachers": [BLOCK]},
        ("loss.targets=raw", "phi-s", "loss.teacher_drop=0"),
    ),
    ("dropping the only teacher", {"loss": {"teacher_drop": 0.3}}, ("loss.teacher_drop=0.3",)),
    (
        "patches of crops without their term",
        {"loss": {"crop_patches": True, "shape": 0}},
        ("loss.crop_patches=True", "loss.shape=0"),
    ),
    ("relations without composites", {"views": {**SIZE, "composites": 0}}, ("loss.relation=1.0",)),
    (
        "relations without an expert",
        {"decoder": {"patterns": 2}},
        ("decoder.patterns=2", "loss.relation"),
    ),
    (
        "no loss at all",
        {"loss": {"identity": 0, "shape": 0, "relation": 0}},
        ("loss.identity", "positive"),
    ),
    (
        "a mask for a loss of weight 0",
        {"loss": {"shape": 0, "shape_mask": "flipped"}},
        ("loss.shape_mask=flipped", "loss.shape=0"),
    ),
    (
        "an affinity for a loss of weight 0",
        {"loss": {"relation": 0, "affinity": "log"}},
        ("loss.affinity=log", "loss.relation=0"),
    ),
    (
        "routing without experts",
        {"decoder": {"kind": "static", "routing": "top-1"}},
        ("decoder.routing=top-1", "decoder.kind=static"),
    ),
    (
        "queries without experts",
        {"decoder": {"kind": "linear", "query_init": "normal"}},
        ("decoder.query_init=normal",),
    ),
    (
        "a router's weight without a router",
        {"decoder": {"kind": "linear"}, "loss": {"router": 0.5}},
        ("loss.router=0.5", "decoder.kind=linear"),
    ),
    (
        "patterns of one shared layer",
        {"decoder": {"kind": "shared", "patterns": 2}, "loss": {"relation": 0}},
        ("decoder.patterns=2", "decoder.kind=shared"),
    ),
    (
        "D-PaDe for another method",
        {"method": "mse", "decoder": {"kind": "static"}},
        ("decoder.kind=static", "method.kind=mse"),
    ),
    (
        "DPAL's weights for another method",
        {"method": "proteus", "loss": {"identity": 0.5}},
        ("loss.identity=0.5", "method.kind=proteus"),
    ),
    (
        "nothing to learn from",
        {"method": {"kind": "mse", "identity": 0, "shape": 0}},
        ("method.identity", "all 0"),
    ),
    (
        "no relation to imitate",
        {"method": {"kind": "tinymim", "qk": 0, "vv": 0}, "teacher": BLOCK},
        ("method.qk", "all 0"),
    ),
    (
        "a mask that no term looks at",
        {"method": {"kind": "proteus", "patch": 0, "mask_ratio": 0.3}},
        ("method.mask_ratio=0.3", "method.patch=0"),
    ),
    (
        "masked patches of a Swin",
        {"method": "proteus", "student": {"name": "swin_tiny"}},
        ("student.name=swin_tiny", "proteus"),
    ),
    (
        "relations of a Swin",
        {"method": "tinymim", "teacher": BLOCK, "student": {"name": "swin_tiny"}},
        ("student.name=swin_tiny", "tinymim"),
    ),
    (
        "relations of 3 heads with 12",
        {"method": "tinymim", "teacher": BLOCK, "student": {"heads": "timm"}},
        ("student.heads=timm", "last_heads"),
    ),
    (
        "relations behind the final norm",
        {"method": "tinymim"},
        ("teacher.tap=norm", "block<k>"),
    ),
    (
        "relations of a convolutional teacher",
        {"method": "tinymim", "teacher": BLOCK, "more_teachers": [ONNX]},
        ("teacher.kind=onnx", "block<k>"),
    ),
    (
        "relations with parameters in parts",
        {"method": "tinymim", "teacher": BLOCK, "train": {"zero_stage": 3}},
        ("train.zero_stage=3", "tinymim"),
    ),
    (
        "SAIP with parameters in parts",
        {"method": "saip", "train": {"zero_stage": 3}},
        ("train.zero_stage=3", "saip"),
    ),
    (
        "SAIP's targets",
        {"method": "saip", "train": {"targets": "online"}},
        ("train.targets=online", "saip"),
    ),
    (
        "an average of parameters in parts",
        {"train": {"ema": 0.9, "zero_stage": 3}},
        ("train.ema=0.9", "zero_stage"),
    ),
    (
        "a warm-up from above",
        {"train": {"lr": 1e-3, "start_lr": 2e-3}},
        ("train.start_lr=0.002", "train.lr=0.001"),
    ),
    (
        "a decay to above",
        {"train": {"lr": 1e-3, "end_lr": 1e-2}},
        ("train.end_lr=0.01",),
    ),
    (
        "a student that does not fit",
        {"student": {"height": 256, "width": 128}},
        ("student.height=256", "views.height=128"),
    ),
    (
        "a taught teacher of real images",
        {"teacher": {"kind": "taught"}},
        ("teacher.kind=taught", "synthetic"),
    ),
]


@pytest.mark.parametrize(
    ("sections", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_nonsense_is_refused_by_name(sections: dict[str, Any], words: tuple[str, ...]) -> None:
    sections = dict(sections)
    with pytest.raises(ConfigError) as caught:
        made_recipe(sections.pop("method", "dpal"), **sections)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("dpal", {}),
        ("dpal", {"decoder": {"routing": "top-1", "query_init": "normal"}}),
        ("dpal", {"decoder": {"kind": "static"}}),
        ("dpal", {"decoder": {"patterns": 2}, "loss": {"relation": 0}}),
        ("dpal", {"more_teachers": [BLOCK, ONNX], "loss": {"teacher_drop": 0.0}}),
        ("mse", {"views": {**SIZE, "composites": 0}}),
        ("proteus", {"train": {"ema": 0.99, "zero_stage": 2}}),
        ("tinymim", {"teacher": BLOCK}),
        ("saip", {"teacher": None}),
        ("saip", {}),
    ],
)
def test_sense_is_accepted_and_read_back(method: str, sections: dict[str, Any]) -> None:
    recipe = made_recipe(method, **sections)
    assert recipe.method.kind == method
    again = resolve_recipe(recipe.model_dump(mode="json", exclude={"storage"}))
    assert isinstance(again, Recipe)
    assert again.science() == recipe.science()


def test_the_bare_word_and_the_section_are_one_recipe() -> None:
    assert made_recipe("tinymim", teacher=BLOCK) == made_recipe({"kind": "tinymim"}, teacher=BLOCK)
    assert made_recipe("dpal").digest() == made_recipe({"kind": "dpal"}).digest()


@pytest.mark.parametrize("key", ["method", "method.kind", "teacher.kind", "more_teachers"])
def test_explain_lists_the_words_of_a_kind(key: str) -> None:
    text = explain(key)
    assert ("tinymim" if key.startswith("method") else "mobilesam") in text
