"""Score frozen features: the student beside its teacher and the same student untrained.

Rows of `evaluation.json` carry who was scored and on what, so a second run computes only what is
missing, and a file that is replaced after every row survives a kill.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.labelled import ParsingSplit, labels_digest, read_parsing, read_reid
from data_tools.synthetic import write_dataset
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.progress import Progress
from dpal.base.recipe import Evaluation, Recipe
from dpal.evaluate.features import Features, extract
from dpal.evaluate.parsing import IGNORE, probe
from dpal.evaluate.reid import ReidLabels, retrieve
from dpal.model.tokens import FrozenBackbone
from jobs.backbones import Candidate, candidates_of, open_model
from jobs.pictures import pictures
from jobs.scores import Row, Scores, headlines, table
from jobs.stage import StageResult

PROTOCOL_VERSION = 1  # raise it whenever the same model and data would score otherwise


def run(recipe: Recipe) -> StageResult:
    """Bring `evaluation.json` of a run up to date and print it.

    Raises:
        DataError: no committed checkpoint, or an evaluation folder that is incomplete.
    """
    if not recipe.evaluate:
        return StageResult("evaluate", True, "the recipe's evaluate section is empty")
    layout = RunLayout(recipe.run_dir)
    if any(evaluation.data == "synthetic" for evaluation in recipe.evaluate):
        write_dataset(layout.synthetic, recipe.data.synthetic, recipe.seed)
    rows, computed = score_candidates(candidates_of(recipe), recipe.evaluate, layout)
    print(table(rows))
    return StageResult("evaluate", not computed, headlines(rows))


def evaluate_model(model_path: str, task: str, data: str) -> tuple[Row, ...]:
    """Score one model on one folder, print the table, and keep the row beside the model.

    Args:
        model_path: a run folder or an export folder.

    Raises:
        ConfigError: an unknown task.
        DataError: a folder that is neither, or labels that are incomplete.
    """
    if task not in SCORERS:
        raise ConfigError(f"--task {task}: accepted is {' or '.join(SCORERS)}")
    layout = RunLayout(Path(model_path))
    wanted = (Evaluation.model_validate({"task": task, "data": data}),)
    rows, _ = score_candidates([open_model(layout.root)], wanted, layout)
    print(table(rows))
    return tuple(rows)


def score_candidates(
    candidates: Sequence[Candidate], wanted: Sequence[Evaluation], layout: RunLayout
) -> tuple[list[Row], int]:
    """The rows of `wanted` in the run's `evaluation.json`, and how many were not there before.

    Raises:
        DataError: an evaluation folder that is incomplete.
    """
    scores = Scores(layout.evaluation)
    rows, computed = [], 0
    for evaluation in wanted:
        synthetic = evaluation.data == "synthetic"
        folder = layout.synthetic / evaluation.task if synthetic else Path(evaluation.data)
        labels = labels_digest(folder)
        for candidate in candidates:
            what = (PROTOCOL_VERSION, evaluation.task, labels, candidate.view_size)
            data_id = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
            place = (evaluation.task, candidate.name, evaluation.data)
            row = scores.find(*place, candidate.model_id, data_id)
            if row is None:
                metrics = SCORERS[evaluation.task](candidate, folder)
                rounded = {name: round(value, 3) for name, value in metrics.items()}
                row = Row(*place, rounded, candidate.model_id, data_id)
                scores.put(row)
                computed += 1
            rows.append(row)
    return rows, computed


def _score_reid(candidate: Candidate, folder: Path) -> dict[str, float]:
    data = read_reid(folder)
    features = _features(candidate, "reid", data.files, patches=False)
    labels = ReidLabels(data.pids, data.cams, data.query, data.gallery)
    try:
        metrics = retrieve(features.cls, labels).metrics()
    except ValueError as error:
        raise DataError(f"{folder / 'labels.csv'}: {error}") from None
    if data.cams is not None:  # a true match was found, so there are at least two cameras
        across = retrieve(features.cls, labels, other_camera_only=True).metrics()
        metrics |= {f"cross-camera {name}": across[name] for name in ("mAP", "rank-1")}
    return metrics


def _score_parsing(candidate: Candidate, folder: Path) -> dict[str, float]:
    data = read_parsing(folder)
    # Masks first: they are cheap, and a damaged one must not cost the features.
    size, num_classes = candidate.view_size, len(data.classes)
    train_masks = _masks(data.train, size, num_classes)
    test_masks = _masks(data.test, size, num_classes)
    train = _features(candidate, "parsing train", data.train.files, patches=True)
    test = _features(candidate, "parsing test", data.test.files, patches=True)
    try:
        return probe(train, train_masks, test, test_masks, data.classes).metrics()
    except ValueError as error:
        raise DataError(f"{folder / 'labels.csv'}: {error}") from None


SCORERS: dict[str, Callable[[Candidate, Path], dict[str, float]]] = {
    "reid": _score_reid,
    "parsing": _score_parsing,
}


def _features(candidate: Candidate, what: str, files: Sequence[Path], *, patches: bool) -> Features:
    backbone: FrozenBackbone = candidate.open()
    with Progress(f"evaluate {candidate.name}, {what}", len(files), "image") as progress:

        def images() -> Iterator[np.ndarray]:
            for image in pictures(files, candidate.view_size, candidate.kept_pictures):
                yield image
                progress.advance()

        return extract(backbone, images(), patches=patches, batch_size=candidate.batch_size)


def _masks(split: ParsingSplit, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Masks squeezed to the view size by nearest neighbour: uint8 [n, H, W]."""
    masks = np.empty((len(split.masks), *size), np.uint8)
    for index, path in enumerate(split.masks):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                mode = picture.mode
                mask = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: not a readable PNG mask ({error})") from None
        if mode not in ("L", "P"):
            raise DataError(f"{path}: a {mode} image; accepted is grey or palette PNG of 8 bits")
        masks[index] = np.asarray(mask)
        worst = int(masks[index][masks[index] != IGNORE].max(initial=0))
        if worst >= num_classes:
            raise DataError(f"{path}: class index {worst}, classes.json has {num_classes} names")
    return masks
