"""Report and model card say what each method is, and show the terms that it logged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.export import Parity
from dpal.method.dpal import DpalTask
from dpal.method.mse import MseTask
from dpal.method.proteus import ProteusTask
from dpal.method.saip import SaipTask
from dpal.method.tinymim import TinyMimTask
from jobs.model_card import model_card
from jobs.reporting.data import gather
from jobs.reporting.page import page
from jobs.reporting.training import TERM_NOTES
from jobs.words import teacher_words

from made_task import TEACHER, made_recipe

BLOCK = {**TEACHER, "tap": "block9"}
SAM = {"kind": "mobilesam", "weights": "a/mobile_sam.pt"}
SOLIDER = {"kind": "solider", "weights": "a/swin.pth", "semantic_weight": 0.2}
TASKS = (DpalTask, MseTask, ProteusTask, TinyMimTask, SaipTask)
ROUTING = {"routing": [[0.8, 0.1, 0.1]] * 3, "router_probability": [0.8, 0.1, 0.1]}
ROUTING |= {"router_entropy": 0.7, "expert_similarity": 0.9}


def write_events(recipe: Recipe, terms: tuple[str, ...], **more: Any) -> None:
    path = RunLayout(recipe.run_dir).events
    path.parent.mkdir(parents=True, exist_ok=True)
    timing = {"lr": 1e-3, "data_s": 0.1, "step_s": 0.2, "images_per_s": 20.0}
    rows = [
        {"event": "step", "step": n, "time": 1.0 * n, **timing, **more}
        | {term: (index + 1) / n for index, term in enumerate(terms)}
        for n in range(1, 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def charts(recipe: Recipe) -> list[str]:
    text = page(gather(recipe))
    return re.findall(r'<figure class="chart"[^>]*><figcaption><b>([^<]+)</b>', text)


def recipe_of(folder: Path, method: str, **sections: Any) -> Recipe:
    teacher = {"teacher": None if method == "saip" else BLOCK}
    return made_recipe(method, output=str(folder), **{**teacher, **sections})


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_every_term_of_a_method_has_its_note(task: Any) -> None:
    assert task.terms[1:] in [tuple(notes) for notes in TERM_NOTES.values()]


@pytest.mark.parametrize("method", TERM_NOTES)
def test_a_page_shows_a_chart_for_every_term_of_the_method(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, method)
    write_events(recipe, ("loss", *TERM_NOTES[method]), **(ROUTING if method == "dpal" else {}))
    shown = charts(recipe)
    terms = [title for title in shown if title.endswith(" term")]
    assert [title.removesuffix(" term").lower() for title in terms] == list(TERM_NOTES[method])
    routed = {"Router", "Router entropy", "Expert similarity"}
    assert routed <= set(shown) if method == "dpal" else not routed & set(shown)
    assert ("called for" in page(gather(recipe))) == (method == "dpal")


def test_a_decoder_without_experts_shows_no_router(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "dpal", decoder={"kind": "static"})
    write_events(recipe, ("loss", "identity", "shape", "relation"), router=0.0, expert=0.0)
    assert not [title for title in charts(recipe) if "outer" in title or "xpert" in title]


def test_two_patterns_make_a_table_of_two(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "dpal", decoder={"patterns": 2}, loss={"relation": 0})
    two = {"routing": [[0.9, 0.1], [0.2, 0.8]], "router_probability": [0.9, 0.8]}
    write_events(recipe, ("loss", "identity"), **two)
    text = page(gather(recipe))
    assert text.count('class="heat"') == 4
    assert "one half is a guess" in text


def test_several_teachers_have_a_line_each(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "mse", more_teachers=[SAM], loss={"targets": "standardised"})
    write_events(recipe, ("loss", "identity", "shape"), teacher_loss=[1.0, 2.0])
    assert "Teachers" in charts(recipe)
    text = page(gather(recipe))
    for name in ("vit_tiny_patch16_224, tap block9", "MobileSAM (mobile_sam.pt)"):
        assert text.count(name) >= 2  # in the lead and in the chart


@pytest.mark.parametrize("student", ["vit_tiny", "swin_tiny", "mobilenetv4_conv_small"])
def test_the_page_and_the_card_name_method_student_and_teacher(
    tmp_path: Path, student: str
) -> None:
    recipe = recipe_of(tmp_path, "mse", student={"name": student}, teacher=SOLIDER)
    card = model_card(recipe, 5, [], Parity(1e-6, 1e-7, 1.0, 8), 1000, 40)
    for text in (page(gather(recipe)), card):
        assert "feature distillation" in text
        assert "SOLIDER (swin.pth), tap norm, semantic weight 0.2" in text
        assert recipe.student.title in text
        assert "dynamic pattern" not in text


def test_a_run_without_a_teacher_says_so(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "saip")
    card = model_card(recipe, 5, [], Parity(1e-6, 1e-7, 1.0, 8), 1000, 40)
    assert "| teacher | none |" in card
    assert "without a teacher" in card
    assert "(<b>SAIP</b>)" in page(gather(recipe))


@pytest.mark.parametrize("kind", ["path", "mae", "hap", "pass", "unihcp", "sapiens"])
def test_every_published_teacher_has_a_name(kind: str) -> None:
    recipe = made_recipe("mse", teacher={"kind": kind, "weights": "a/b.pth", "tap": "block3"})
    assert recipe.teacher is not None
    assert teacher_words(recipe.teacher).lower() == f"{kind} (b.pth), tap block3"
