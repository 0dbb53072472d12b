"""The teach stage: skips what is done, survives being stopped, sees pretraining identities only."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_tools.synthetic import PARTS, draw_person
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError, StopRequested
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.model.teacher import build_teacher
from dpal.views.specs import Box, ViewSpec
from jobs import teach, teach_data
from jobs.teach_data import TeachSet, recolour


def _recipe(folder: Path, **teacher: object) -> Recipe:
    return resolve_recipe(
        {
            "name": "teach",
            "output": str(folder),
            "data": {
                "images": ["synthetic"],
                "synthetic": {
                    "identities": 4,
                    "images_per_identity": 3,
                    "held_out_identities": 4,
                },
            },
            "views": {"height": 128, "width": 64},
            "student": {"height": 128, "width": 64},
            "teacher": {
                "kind": "taught",
                "width": 48,
                "depth": 1,
                "heads": 3,
                "steps": 6,
                "global_batch": 8,
                **teacher,
            },
        }
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = _recipe(tmp_path_factory.mktemp("runs"))
    assert not teach.run(recipe).skipped
    return recipe


def test_a_taught_teacher_is_not_taught_again(taught: Recipe) -> None:
    weights = RunLayout(taught.run_dir).teacher
    before = weights.stat().st_mtime_ns
    assert teach.run(taught).skipped
    assert weights.stat().st_mtime_ns == before


def test_whatever_decides_the_weights_decides_the_digest(taught: Recipe, tmp_path: Path) -> None:
    digest = teach.teaching_digest(taught)
    assert digest == teach.teaching_digest(_recipe(tmp_path))
    assert digest == teach.teaching_digest(_recipe(tmp_path, batch_size=7))  # inference only
    assert digest != teach.teaching_digest(_recipe(tmp_path, steps=7))
    assert digest != teach.teaching_digest(taught.model_copy(update={"seed": 1}))


def test_damaged_weights_are_taught_again_to_the_same_bytes(taught: Recipe, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    shutil.copytree(taught.run_dir, recipe.run_dir)
    weights = RunLayout(recipe.run_dir).teacher
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert not teach.run(recipe).skipped
    assert weights.read_bytes() == whole


def test_a_stop_signal_saves_and_the_next_run_ends_with_the_same_weights(
    taught: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path)
    shutil.copytree(RunLayout(taught.run_dir).synthetic, RunLayout(recipe.run_dir).synthetic)
    steps: list[int] = []
    advance = teach._Lesson.advance

    def counted(lesson: teach._Lesson):  # type: ignore[no-untyped-def]
        steps.append(lesson.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(lesson)

    monkeypatch.setattr(teach._Lesson, "advance", counted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="step 3"):
        teach.run(recipe)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not RunLayout(recipe.run_dir).teacher.exists()
    teach.run(recipe)
    assert steps == [0, 1, 2, 3, 4, 5]
    undisturbed = load_file(RunLayout(taught.run_dir).teacher)
    resumed = load_file(RunLayout(recipe.run_dir).teacher)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert [path.name for path in RunLayout(recipe.run_dir).teacher.parent.iterdir()] == [
        "teacher.safetensors"
    ]


def test_another_kind_of_teacher_needs_no_lesson(taught: Recipe) -> None:
    values = taught.model_dump(mode="json", exclude={"storage"})
    values["teacher"] = {"kind": "timm", "name": "vit_tiny_patch16_224"}
    result = teach.run(resolve_recipe(values))
    assert result.skipped
    assert "timm" in result.detail


def test_the_weights_open_as_a_teacher(taught: Recipe) -> None:
    path = RunLayout(taught.run_dir).teacher
    teacher = build_teacher(taught.teacher, stride=16, view_size=(128, 64), taught_weights=path)
    views = torch.randint(0, 256, (2, 128, 64, 3), dtype=torch.uint8)
    tokens = teacher(views)
    assert tokens.cls.shape == (2, 48)
    assert tokens.patches.shape == (2, 32, 48)
    assert not torch.equal(tokens.cls[0], tokens.cls[1])
    with safe_open(path, "pt") as file:
        assert file.metadata()["digest"] == teach.teaching_digest(taught)


def test_batches_repeat_and_hold_pairs_of_pretraining_identities(taught: Recipe) -> None:
    persons = TeachSet(RunLayout(taught.run_dir).synthetic / "teach")
    assert persons.num_identities == 4
    one, two = (persons.batch(0, 5, 8, taught.views) for _ in range(2))
    other = persons.batch(0, 6, 8, taught.views)
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    counts = torch.bincount(one.labels.identities)
    assert set(counts.tolist()) == {0, 4} or set(counts.tolist()) == {4}
    assert 0 <= float(one.pixels.min()) <= float(one.pixels.max()) <= 1
    assert one.labels.parts.shape == (8, 32, 16)


def test_part_labels_follow_the_box_and_the_flip() -> None:
    mask = draw_person(0, 1, 0).parts
    box = Box(20, 10, 100, 50)
    plain = teach_data._render_mask(mask, ViewSpec(box, flip=False), (128, 64))
    flipped = teach_data._render_mask(mask, ViewSpec(box, flip=True), (128, 64))
    assert np.array_equal(plain[:, ::-1], flipped)
    centre = mask[20 + 50 : 20 + 54, 10 + 24 : 10 + 27]
    assert plain[16, 8] in centre
    assert plain.max() < len(PARTS)


def test_recolouring_changes_every_view_in_its_own_way() -> None:
    planes = torch.full((2, 3, 8, 4), 0.5)
    noisy = recolour(planes, torch.Generator().manual_seed(0))
    assert not torch.allclose(noisy[0], planes[0], atol=1e-3)
    assert not torch.allclose(noisy[0], noisy[1], atol=1e-3)


def test_labels_that_name_a_missing_file_are_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,pid,cam,mask\nx.jpg,0,0,x.png\n")
    with pytest.raises(DataError, match=r"labels\.csv"):
        TeachSet(tmp_path)
