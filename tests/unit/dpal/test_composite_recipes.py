"""Which composites, noises and relations a recipe may ask for together."""

from typing import Any

import pytest

from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe

SCENES = {"data.scenes": ["s"], "views.composite": "scenes"}


def recipe(changes: dict[str, Any], method: str = "dpal") -> Recipe:
    values: dict[str, Any] = {
        "name": "composites",
        "data": {"images": ["p"]},
        "method": method,
        "train": {"global_batch": 256},
    }
    if method != "saip":
        values["teacher"] = {"kind": "timm", "name": "vit_tiny_patch16_224", "weights": "w"}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    return resolve_recipe(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"views.composite": "two"},
        {"views.photometric": "pinned"},
        SCENES,
        SCENES | {"data.max_scenes": 10, "views.photometric": "pinned"},
        SCENES | {"loss.relation_level": "instances"},
    ],
    ids=str,
)
def test_meaningful_choices_are_accepted(changes: dict[str, Any]) -> None:
    made = recipe(changes)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        actual = getattr(getattr(made, section), name)
        assert (list(actual) if isinstance(actual, tuple) else actual) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views.composite": "scenes"}, "needs data.scenes"),
        ({"data.scenes": ["s"]}, "data.scenes.*has no effect with views.composite=same"),
        (
            {"data.scenes": ["s"], "views.composite": "two"},
            "data.scenes.*has no effect with views.composite=two",
        ),
        ({"data.max_scenes": 9}, "data.max_scenes=9 has no effect"),
        (SCENES | {"data.backgrounds": ["b"]}, "data.backgrounds.*has no effect"),
        ({"views.composite": "two", "views.composites": 0}, "views.composite=two has no effect"),
        ({"loss.relation_level": "instances"}, "accepted is views.composite=scenes"),
        (
            SCENES | {"loss.relation_level": "instances", "loss.relation": 0.0},
            "no effect with loss.relation=0",
        ),
        (
            SCENES | {"loss.relation_level": "instances", "loss.affinity": "log"},
            "loss.affinity=log",
        ),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as told:
        recipe(changes)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "changes", [{"views.composite": "two"}, {"views.photometric": "pinned"}, SCENES], ids=str
)
def test_saip_has_no_pinned_views_to_choose(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no effect with method\.kind=saip"):
        recipe(changes, method="saip")


def test_other_methods_cannot_relate_instances_but_may_share_the_cache() -> None:
    assert recipe(SCENES, method="proteus").views.composite == "scenes"
    with pytest.raises(ConfigError, match=r"loss\.relation_level=instances has no effect"):
        recipe(SCENES | {"loss.relation_level": "instances"}, method="proteus")
