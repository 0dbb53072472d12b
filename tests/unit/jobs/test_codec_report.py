"""`dpal codecs`: what it says about a codec is what the codec does."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpal.base.codec import parse_codec
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe
from dpal.model.teacher import Teacher
from dpal.record import RecordLayout
from dpal.rotation import Rotation
from jobs.__main__ import main
from jobs.codec_report import CodecReport, codecs, rank_within, text, usual
from jobs.codec_sample import draw_sample, through

from tiny import tiny_recipe, tiny_values, write_recipe

WORDS = ("fp32", "fp16", "int8", "pca64-int8", "pca64-int4")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("codecs"))


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> CodecReport:
    return codecs(recipe, WORDS, 16)[0]


def test_errors_and_bytes_of_the_codecs_stand_in_order(report: CodecReport) -> None:
    rows = {row.codec: row for row in report.rows}
    assert tuple(rows) == WORDS
    assert [row.nmse for row in report.rows] == sorted(row.nmse for row in report.rows)
    assert [row.base_bytes for row in report.rows] == sorted(
        (row.base_bytes for row in report.rows), reverse=True
    )
    exact, int8, turned = rows["fp32"], rows["int8"], rows["pca64-int8"]
    assert exact.nmse == exact.largest == 0
    assert exact.cosine == pytest.approx(1)
    assert set(exact.losses) == {"loss", "identity", "shape", "relation"}
    assert not any(exact.losses.values())
    assert 0 < int8.nmse < 1e-3
    assert 0 < abs(int8.losses["shape"]) < 1e-2
    # The sample is not what PCA was fitted on, so more is lost than what it leaves out there.
    assert turned.kept is not None
    assert 1 - turned.kept < turned.nmse < 1
    assert int8.base_bytes == 12 + 2 * 192 + 32 * (192 + 2) + 4
    assert int8.composite_bytes == 44 + 2 * 192 + 64 * (192 + 2) + 4
    assert rows["fp16"].of_fp16 == 1
    assert all(row.clipped == 0 for row in report.rows)


def test_the_errors_are_their_formulas_in_float64(recipe: Recipe, report: CodecReport) -> None:
    sample = draw_sample(recipe, 16)
    header = sample.header("pca64-int4")
    exact = np.concatenate([t.base.patches for t in sample.exact]).astype(np.float64)
    decoded = [through(header, t.base, "view").patches for t in sample.exact]
    x, y = exact - header.patch_mean, np.concatenate(decoded) - header.patch_mean
    row = report.rows[-1]
    assert row.nmse == pytest.approx(((y - x) ** 2).sum() / (x**2).sum(), rel=1e-6)
    standard = (((y - x) / header.patch_std) ** 2).sum() / ((x / header.patch_std) ** 2).sum()
    assert row.nmse_standardised == pytest.approx(standard, rel=1e-6)
    lengths = np.linalg.norm(x, axis=2) * np.linalg.norm(y, axis=2)
    assert row.cosine == pytest.approx(((x * y).sum(2) / lengths).mean(), rel=1e-6)
    assert row.largest == pytest.approx(np.abs((y - x) / header.patch_std).max(), rel=1e-6)


def test_a_sample_and_its_calibration_share_no_image(recipe: Recipe) -> None:
    sample = draw_sample(recipe, 16)
    assert sample.disjoint
    assert (sample.calibration_images, sample.num_images) == (16, 16)
    keys = [key for batch in sample.batches for key in batch.keys]
    assert len(set(keys)) == 16


def test_the_verb_prints_a_table_and_writes_json(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_recipe(recipe, tmp_path / "recipe.yaml"), tmp_path / "codecs.json"
    words = ["int8", "phis-int8", "loss.targets=standardised", "--images", "16"]
    assert main(["codecs", str(file), *words, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    (plain,) = json.loads(out.read_text())
    assert plain["method"] == "dpal, loss.targets=standardised"
    assert [row["codec"] for row in plain["rows"]] == ["int8", "phis-int8"]
    assert f"{plain['rows'][1]['nmse']:.1e}" in printed
    assert "other images" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["zip"], "cache.codec='zip': accepted are int8"),
        (["pca192-int8"], "cache.codec=pca192-int8: the teacher's tokens have 192 channels"),
        (["int8", "--images", "0"], "--images 0"),
    ],
)
def test_words_that_fit_no_teacher_end_with_a_sentence(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    file = write_recipe(recipe, tmp_path / "recipe.yaml")
    assert main(["codecs", str(file), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_codec_that_does_not_fit_is_refused_before_the_teacher_looks(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "__call__", None)
    with pytest.raises(ConfigError, match=r"cache\.codec=pca256-int8.* 192 channels"):
        codecs(recipe, ["int8", "pca256-int8"], 8)


def test_a_method_without_teacher_has_nothing_to_store(tmp_path: Path) -> None:
    values = {**tiny_values(tmp_path), "method": "saip"}
    for key in ("teacher", "cache"):
        del values[key]
    with pytest.raises(ConfigError, match=r"method\.kind=saip has no targets"):
        codecs(resolve_recipe(values), ["int8"])


@pytest.mark.parametrize(("width", "patches"), [(256, 128), (768, 128), (192, 32), (16, 8)])
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_largest_rank_within_a_share_is_found(width: int, patches: int, storage: str) -> None:
    layout = RecordLayout("view", "fp32", width, patches)
    fixed = 12 + 2 * width + 4
    limit = (fixed + 2 * width * patches) / 6
    sizes = {
        rank: fixed + patches * (rank + 2 if storage == "int8" else rank // 2 + 2 * -(-rank // 32))
        for rank in range(4, width, 2)
    }
    fitting = [rank for rank, size in sizes.items() if size <= limit]
    assert rank_within(1 / 6, storage, layout) == max(fitting, default=0)


def test_the_usual_codecs_fit_a_width_without_a_hadamard_matrix() -> None:
    words = usual(RecordLayout("view", "fp32", 184, 32))  # 8 * 23
    assert "pca128-int8" in words
    for word in words:
        Rotation.fit(parse_codec(word), np.zeros(184), np.eye(184))
    assert "phis-int4" in usual(RecordLayout("view", "fp32", 192, 32))


def test_the_text_names_every_codec(report: CodecReport) -> None:
    lines = text(report).splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(WORDS)
