"""`dpal evaluate`: right rows, nothing computed twice, one sentence for every bad folder."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.checkpoint import commit, latest
from dpal.engine import EngineState
from dpal.export import ARCHITECTURES, write_timm
from dpal.model.student import SHAPES, Shape, build_student
from dpal.model.timm_import import timm
from jobs import evaluate
from jobs.backbones import student_of
from jobs.scores import Row, table

ARCH = {"img_size": [128, 64], "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
MODELS = ["student", "teacher", "untrained"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a student of two narrow blocks."""
    monkeypatch.setitem(SHAPES, "vit_tiny", Shape(48, 2, paper_heads=6, timm_heads=3))
    monkeypatch.setitem(ARCHITECTURES, 48, ARCHITECTURES[192])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_csv(path: Path, rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def write_reid(folder: Path) -> Path:
    """Four persons, each of one colour, seen by two cameras of different brightness."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows: list[tuple[object, ...]] = [("file", "pid", "cam")]
    for pid in range(4):
        for cam in range(2):
            pixels = np.full((90, 40, 3), rng.integers(20, 200, 3)) + rng.integers(
                0, 40, (90, 40, 3)
            )
            Image.fromarray((pixels * (1 - 0.2 * cam)).astype(np.uint8)).save(
                folder / f"{pid}{cam}.jpg"
            )
            rows.append((f"{pid}{cam}.jpg", pid, cam))
    write_csv(folder / "labels.csv", rows)
    return folder


def write_parsing(folder: Path) -> Path:
    """Bright rectangles on dark ground; palette masks."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows: list[tuple[object, ...]] = [("file", "mask", "split")]
    for index in range(9):
        mask = np.zeros((64, 32), np.uint8)
        top = int(rng.integers(0, 30))
        mask[top : top + 30, 8:24] = 1
        Image.fromarray(np.stack([mask * 180 + 30] * 3, 2)).save(folder / f"{index}.jpg")
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.save(folder / f"{index}.png")
        rows.append((f"{index}.jpg", f"{index}.png", "train" if index < 6 else "test"))
    write_csv(folder / "labels.csv", rows)
    (folder / "classes.json").write_text('["background", "person"]')
    return folder


def commit_student(recipe: Recipe, step: int, seed: int) -> None:
    student = build_student(recipe.student, seed=seed).state_dict()
    parameters = {f"student.{name}": tensor for name, tensor in student.items()}
    parameters["decoder.output_norm.weight"] = torch.ones(32)
    state = EngineState(step, parameters, {}, {})
    commit(RunLayout(recipe.run_dir).checkpoints, state, recipe.science(), keep=2)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run with a committed student, a small taught teacher and two evaluation sets."""
    reid, parsing = write_reid(tmp_path / "reid"), write_parsing(tmp_path / "parsing")
    recipe = resolve_recipe(
        {
            "name": "run",
            "output": str(tmp_path / "runs"),
            "data": {"images": ["synthetic"]},
            "views": {"height": 128, "width": 64},
            "student": {"height": 128, "width": 64},
            "teacher": {"kind": "taught"},
            "evaluate": [
                {"task": "reid", "data": str(reid)},
                {"task": "parsing", "data": str(parsing)},
            ],
        }
    )
    layout = RunLayout(recipe.run_dir)
    layout.teacher.parent.mkdir(parents=True)
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer(**ARCH, num_classes=0)
    save_file(vit.state_dict(), layout.teacher, metadata={"arch": json.dumps(ARCH)})
    layout.recipe.write_text(recipe.to_yaml())
    commit_student(recipe, step=10, seed=5)
    return recipe


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(task, model) of every score that is really computed, in order."""
    calls: list[tuple[str, str]] = []

    def counted(task: str, score: Callable[..., dict[str, float]]) -> Callable[..., object]:
        def call(candidate, folder):
            calls.append((task, candidate.name))
            return score(candidate, folder)

        return call

    for task, score in list(evaluate.SCORERS.items()):
        monkeypatch.setitem(evaluate.SCORERS, task, counted(task, score))
    return calls


def rows_of(recipe: Recipe) -> dict[tuple[str, str], dict]:
    entries = json.loads(RunLayout(recipe.run_dir).evaluation.read_text())
    return {(entry["task"], entry["model"]): entry for entry in entries}


def test_all_three_models_are_scored_and_a_second_run_computes_nothing(recipe, scored, capsys):
    first = evaluate.run(recipe)
    assert not first.skipped
    assert scored == [(task, model) for task in ("reid", "parsing") for model in MODELS]
    rows = rows_of(recipe)
    assert rows.keys() == set(scored)
    for (task, _), row in rows.items():
        assert all(0 <= value <= 100 for value in row["metrics"].values())
        assert ("mAP" if task == "reid" else "mIoU") in row["metrics"]
    assert len({json.dumps(rows["parsing", model]["metrics"]) for model in MODELS}) == 3
    before = RunLayout(recipe.run_dir).evaluation.read_bytes()
    again = evaluate.run(recipe)
    assert again.skipped
    assert again.detail == first.detail
    assert len(scored) == 6
    assert RunLayout(recipe.run_dir).evaluation.read_bytes() == before
    assert "untrained" in capsys.readouterr().out


def test_a_killed_evaluation_keeps_its_rows_and_goes_on(recipe, scored, monkeypatch):
    whole = evaluate.SCORERS["parsing"]

    def killed(candidate, folder):
        if candidate.name == "teacher":
            raise KeyboardInterrupt
        return whole(candidate, folder)

    monkeypatch.setitem(evaluate.SCORERS, "parsing", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(recipe)
    kept = rows_of(recipe)
    assert len(kept) == 4
    scored.clear()
    monkeypatch.setitem(evaluate.SCORERS, "parsing", whole)
    assert not evaluate.run(recipe).skipped
    assert scored == [("parsing", "teacher"), ("parsing", "untrained")]
    assert {key: rows_of(recipe)[key] for key in kept} == kept


def test_a_new_checkpoint_scores_only_the_student_again(recipe, scored):
    evaluate.run(recipe)
    old = rows_of(recipe)
    scored.clear()
    commit_student(recipe, step=20, seed=6)
    evaluate.run(recipe)
    assert scored == [("reid", "student"), ("parsing", "student")]
    new = rows_of(recipe)
    assert len(new) == 6
    assert new["parsing", "student"]["metrics"] != old["parsing", "student"]["metrics"]
    assert new["parsing", "teacher"] == old["parsing", "teacher"]


def test_changed_labels_score_that_set_again(recipe, scored):
    evaluate.run(recipe)
    scored.clear()
    labels = Path(recipe.evaluate[0].data) / "labels.csv"
    labels.write_text(labels.read_text().replace("31.jpg,3,1", "31.jpg,2,1"))
    evaluate.run(recipe)
    assert scored == [("reid", model) for model in MODELS]


def test_student_with_untrained_weights_scores_as_the_untrained_one(recipe):
    commit_student(recipe, step=20, seed=recipe.seed)
    evaluate.run(recipe)
    rows = rows_of(recipe)
    for task in ("reid", "parsing"):
        assert rows[task, "student"]["metrics"] == rows[task, "untrained"]["metrics"]


def test_a_damaged_score_file_is_replaced(recipe):
    RunLayout(recipe.run_dir).evaluation.write_text('[{"task": "reid"}')
    assert not evaluate.run(recipe).skipped
    assert len(rows_of(recipe)) == 6


def test_run_folder_and_export_folder_give_the_same_scores(recipe, tmp_path, capsys):
    data = recipe.evaluate[1].data
    (from_run,) = evaluate.evaluate_model(str(recipe.run_dir), "parsing", data)
    export = tmp_path / "export"
    export.mkdir()
    found = latest(RunLayout(recipe.run_dir).checkpoints)
    assert found is not None
    write_timm(student_of(recipe.student, found), export)
    (from_export,) = evaluate.evaluate_model(str(export), "parsing", data)
    assert from_export.metrics == from_run.metrics
    assert "mIoU" in capsys.readouterr().out
    assert json.loads((export / "evaluation.json").read_text())[0]["model"] == "student"


def test_a_damaged_student_is_named(recipe):
    found = latest(RunLayout(recipe.run_dir).checkpoints)
    path = found.path / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"student\.safetensors does not match"):
        evaluate.run(recipe)


def test_a_run_without_checkpoint_says_so(recipe):
    found = latest(RunLayout(recipe.run_dir).checkpoints)
    (found.path / "COMMITTED").unlink()
    with pytest.raises(DataError, match="no committed checkpoint"):
        evaluate.run(recipe)


def test_an_empty_evaluate_section_is_skipped(recipe):
    assert evaluate.run(recipe.model_copy(update={"evaluate": ()})).skipped


@pytest.mark.parametrize(
    ("task", "file", "old", "new", "words"),
    [
        ("reid", "labels.csv", None, None, "has no labels.csv"),
        ("reid", "labels.csv", "pid", "person", "no column 'pid'"),
        (
            "reid",
            "labels.csv",
            "30.jpg",
            "missing.jpg",
            "file 'missing.jpg' does not exist",
        ),
        ("reid", "labels.csv", "30.jpg", "../reid/30.jpg", "outside the folder"),
        ("reid", "labels.csv", ",1\r", ",0\r", "no query has a valid match"),
        ("reid", "00.jpg", "\xff\xd8", "no", "00.jpg: image is not decodable"),
        ("parsing", "labels.csv", "split", "part", "no column 'split'"),
        ("parsing", "labels.csv", "test", "val", "split 'val'; accepted is train or test"),
        ("parsing", "labels.csv", "test", "train", "no row with split 'test'"),
        ("parsing", "labels.csv", "8.png", "8.jpg", "8.jpg: not a readable PNG mask"),
        ("parsing", "classes.json", '"person"', '"background"', "different names"),
        ("parsing", "classes.json", None, None, "classes.json must be a list"),
    ],
)
def test_a_bad_folder_ends_with_one_sentence(recipe, task, file, old, new, words):
    folder = Path(next(entry.data for entry in recipe.evaluate if entry.task == task))
    if old is None:
        (folder / file).unlink()
    else:
        content = (folder / file).read_bytes()
        assert old.encode("latin-1") in content
        (folder / file).write_bytes(content.replace(old.encode("latin-1"), new.encode("latin-1")))
    with pytest.raises(DataError) as caught:
        evaluate.evaluate_model(str(recipe.run_dir), task, str(folder))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mask_with_an_unnamed_index_is_named(recipe):
    folder = Path(recipe.evaluate[1].data)
    Image.fromarray(np.full((64, 32), 2, np.uint8)).save(folder / "4.png")
    with pytest.raises(DataError, match=r"4\.png: class index 2, classes\.json has 2 names"):
        evaluate.evaluate_model(str(recipe.run_dir), "parsing", str(folder))


def test_unknown_task_and_unknown_model_are_named(recipe, tmp_path):
    with pytest.raises(ConfigError, match="--task pose: accepted is reid or parsing"):
        evaluate.evaluate_model(str(recipe.run_dir), "pose", "x")
    with pytest.raises(DataError, match="neither a run folder"):
        evaluate.evaluate_model(str(tmp_path), "reid", recipe.evaluate[0].data)


def test_table_puts_models_side_by_side():
    rows = [
        Row("reid", "student", "d", {"mAP": 41.25, "rank-1": 50.0}, "a", "b"),
        Row("reid", "teacher", "d", {"mAP": 73.4}, "a", "b"),
    ]
    head, mean_ap, rank = table(rows).splitlines()
    assert head.split() == ["reid,", "d", "(%)", "student", "teacher"]
    assert mean_ap.split() == ["mAP", "41.2", "73.4"]
    assert rank.split() == ["rank-1", "50.0", "-"]
