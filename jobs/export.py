"""`dpal export`: the trained student as a folder for timm, or as an ONNX graph beside it."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from data_tools.manifest import manifest_of
from data_tools.storage import open_store
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.export import ONNX, WEIGHTS, Parity, check_onnx, check_timm, write_onnx, write_timm
from dpal.model.student import Student
from dpal.views.plan import ViewPlan
from dpal.views.render import render
from jobs.backbones import last_checkpoint, student_of
from jobs.learned import learned_manifest
from jobs.model_card import model_card
from jobs.preview import sample_images
from jobs.publish import new_folder, read_record, write_text
from jobs.reporting.data import read_scores
from jobs.stage import StageResult

VERSION = 3  # raise it whenever the same student would be exported otherwise
FORMATS = ("timm", "onnx")
NUM_VIEWS = 16
PARITY, ONNX_PARITY = "parity.json", "onnx.json"


def run(recipe: Recipe, format: str = "timm") -> StageResult:
    """Export the last committed student to `export/`; skipped when that is what lies there.

    Args:
        format: "timm" writes the folder; "onnx" adds `model.onnx` to it.

    Raises:
        ConfigError: for another format.
        DataError: without a checkpoint, or when the export does not give the student's features.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: accepted are {' and '.join(FORMATS)}")
    folder = RunLayout(recipe.run_dir).export
    checkpoint = last_checkpoint(recipe)
    if checkpoint is None:
        raise DataError(f"run {recipe.name!r} has no committed checkpoint; train it first")
    digest, step = _digest(recipe, checkpoint.digest), checkpoint.step
    student: Student | None = None
    done = []
    if not _is_done(folder / PARITY, digest):
        student = student_of(recipe.student, checkpoint)
        parity = _export_timm(recipe, student, step, digest)
        done.append(f"{folder} (step {step}, {_words(parity)})")
    if format == "onnx" and not _is_done(folder / ONNX_PARITY, digest):
        student = student or student_of(recipe.student, checkpoint)
        parity = _export_onnx(recipe, student, step, digest)
        done.append(f"{folder / ONNX} ({_words(parity)})")
    detail = ", ".join(done) or f"{folder} holds step {step} already"
    return StageResult("export", not done, detail)


def _export_timm(recipe: Recipe, student: Student, step: int, digest: str) -> Parity:
    layout, views = RunLayout(recipe.run_dir), _views(recipe)
    with new_folder(layout.export) as aside:
        write_timm(student, aside)
        parity = check_timm(student, aside, views)
        scores = read_scores(layout.evaluation)
        size = (aside / WEIGHTS).stat().st_size
        card = model_card(recipe, step, scores, parity, size, _num_images(recipe))
        (aside / "README.md").write_text(card)
        _write_parity(aside / PARITY, parity, step, digest)
    return parity


def _export_onnx(recipe: Recipe, student: Student, step: int, digest: str) -> Parity:
    folder = RunLayout(recipe.run_dir).export
    aside = folder / f".{ONNX}.{os.getpid()}"
    try:
        write_onnx(student, aside)
        parity = check_onnx(student, aside, _views(recipe))
        os.replace(aside, folder / ONNX)
    finally:
        aside.unlink(missing_ok=True)
    _write_parity(folder / ONNX_PARITY, parity, step, digest)
    return parity


def _views(recipe: Recipe) -> np.ndarray:
    """Real views of the run at the student's input size, uint8 [B, H, W, 3]."""
    store = open_store(recipe.data.shards, recipe.storage)
    keys, images = sample_images(recipe, store, manifest_of(recipe).shards[0], NUM_VIEWS)
    plan = ViewPlan(recipe.seed, recipe.views)
    size = (recipe.student.height, recipe.student.width)
    pairs = zip(keys, images, strict=True)
    return np.stack(
        [render(image, plan.base(key, 0, image.shape[:2]), size) for key, image in pairs]
    )


def _num_images(recipe: Recipe) -> int:
    return learned_manifest(recipe).num_samples


def _digest(recipe: Recipe, weights: str) -> str:
    evaluation = RunLayout(recipe.run_dir).evaluation
    scores = evaluation.read_text() if evaluation.is_file() else ""
    text = json.dumps([VERSION, recipe.digest(), weights, scores])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_done(file: Path, digest: str) -> bool:
    return bool(read_record(file).get("digest") == digest)


def _write_parity(file: Path, parity: Parity, step: int, digest: str) -> None:
    written = datetime.now(UTC).strftime("%Y-%m-%d")
    values = {"digest": digest, "step": step, "written": written, **parity._asdict()}
    write_text(file, json.dumps(values, indent=2) + "\n")


def _words(parity: Parity) -> str:
    return f"features of {parity.num_images} views agree to {parity.max_abs_error:.1e}"
