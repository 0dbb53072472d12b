"""A recipe with several teachers: each is named, cached apart, audited, taught and compared."""

import json
from pathlib import Path

import pytest

from data_tools.covariance import COVARIANCE
from dpal.base.config import resolve_recipe
from dpal.base.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, DataError
from dpal.base.inputs import Storage
from dpal.base.recipe import Recipe
from jobs import backbones, build_shards, cache_features, teach
from jobs.__main__ import main
from jobs.audit import run_audit
from jobs.caching.plan import single_teacher_recipes, teacher_names
from jobs.caching.worker import ShardWorker
from jobs.reporting.data import read_scores
from jobs.run import _needed
from jobs.saved_recipe import save_recipe
from jobs.scores import Row, table

from tiny import tiny_values

ONNX = {"kind": "onnx", "weights": "nets/reid.onnx", "global_output": "g", "dense_output": "d"}
TIMM = {"kind": "timm", "name": "vit_tiny_patch16_224"}
SIZE = {"height": 128, "width": 64}
TAUGHT = {"kind": "taught", "width": 48, "depth": 1, "heads": 3, "steps": 2, "global_batch": 8}


def recipe_of(folder: Path, first: dict | None, *more: dict, method: str = "dpal") -> Recipe:
    synthetic = {"identities": 4, "images_per_identity": 3, "held_out_identities": 4}
    return resolve_recipe(
        {
            "name": "several",
            "output": str(folder),
            "data": {"images": ["synthetic"], "synthetic": synthetic},
            "views": SIZE,
            "student": SIZE,
            "method": method,
            "teacher": first,
            "more_teachers": list(more),
            "loss": {"targets": "standardised"},
        }
    )


@pytest.mark.parametrize(
    ("teachers", "names"),
    [
        ([TIMM], ["teacher"]),
        ([ONNX, TIMM], ["teacher reid", "teacher vit_tiny_patch16_224"]),
        (
            [TIMM, TAUGHT, TIMM | {"tap": "block3"}],
            ["teacher vit_tiny_patch16_224 1", "teacher taught", "teacher vit_tiny_patch16_224 2"],
        ),
    ],
)
def test_every_teacher_has_a_name_of_its_own(
    tmp_path: Path, teachers: list[dict], names: list[str]
) -> None:
    assert list(teacher_names(recipe_of(tmp_path, *teachers))) == names


def test_a_taught_teacher_is_taught_as_it_would_be_alone(tmp_path: Path) -> None:
    several, alone = recipe_of(tmp_path, TIMM, TAUGHT), recipe_of(tmp_path, TAUGHT)
    assert not teach.run(several).skipped
    assert teach.run(alone).skipped  # the same weights, so the same digest
    assert "teach" in [name for name, _ in _needed(several)]
    assert "teach" not in [name for name, _ in _needed(recipe_of(tmp_path, TIMM))]


def test_two_taught_teachers_would_share_one_file_and_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accepted is one"):
        teach.run(recipe_of(tmp_path, TAUGHT, TAUGHT | {"depth": 2}))


def test_evaluation_compares_the_student_with_every_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_values(tmp_path)
    more = {"more_teachers": [values["teacher"] | {"tap": "block3"}]}
    recipe = resolve_recipe({**values, **more, "loss": {"targets": "standardised"}})
    untrained = backbones.untrained_student(recipe)
    monkeypatch.setattr(backbones, "_latest", lambda folder: None)
    monkeypatch.setattr(backbones, "_trained", lambda recipe, found: untrained)
    first, second = backbones.candidates_of(recipe)[1:-1]
    assert (first.name, second.name) == teacher_names(recipe)
    assert first.model_id != second.model_id
    alone = backbones.candidates_of(recipe.with_teacher(recipe.teachers[0]))[1]
    assert (alone.name, alone.model_id) == ("teacher", first.model_id)
    assert second.open().identity["tap"] == "block3"


def test_the_table_is_as_wide_as_the_names_and_the_report_takes_the_best(tmp_path: Path) -> None:
    scores = {"student": 40.0, "teacher osnet_reid": 70.5, "teacher mobilesam": 20.0}
    rows = [Row("reid", name, "set", {"mAP": value}, "m", "d") for name, value in scores.items()]
    head, line = table(rows).splitlines()
    for name, value in scores.items():
        end = head.index(name) + len(name)
        assert line[:end].endswith(f" {value:.1f}")
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([row._asdict() for row in rows]))
    (score,) = read_scores(path)
    assert (score.untrained, score.student, score.teacher) == (None, 40.0, 70.5)


def test_audit_names_what_is_damaged_in_any_teachers_cache(tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    more = {"more_teachers": [values["teacher"] | {"tap": "block3"}]}
    recipe = resolve_recipe({**values, **more, "loss": {"targets": "standardised"}})
    build_shards.run(recipe)
    stores = []
    for single in single_teacher_recipes(recipe):
        worker = ShardWorker(single)
        worker.calibrate()
        worker.cache_shard(worker.manifest.shards[0])
        stores.append(worker.cache.store)
    assert run_audit(recipe.cache.url, Storage()) == EXIT_DONE
    (Path(stores[1].path(COVARIANCE))).write_bytes(stores[0].get(COVARIANCE))
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(recipe.cache.url, Storage())


@pytest.mark.parametrize("teachers", [(), (TIMM,)])
def test_saip_has_nothing_to_cache_and_no_loss_to_diagnose(
    tmp_path: Path, teachers: tuple[dict, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tmp_path, *(teachers or (None,)), method="saip")
    assert cache_features.run(recipe).skipped  # no shard and no network is looked at
    save_recipe(recipe)
    assert main(["diagnose", str(recipe.run_dir)]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "method.kind=saip has no loss" in said
    assert said.count("\n") == 1


def test_a_student_that_timm_does_not_know_costs_no_cache(tmp_path: Path) -> None:
    values = {**tiny_values(tmp_path), "student": {"name": "resnet0", **SIZE}}
    recipe = resolve_recipe(values)
    build_shards.run(recipe)
    with pytest.raises(ConfigError, match="resnet0"):
        cache_features.run(recipe)
    assert not list(tmp_path.rglob("header.json"))
