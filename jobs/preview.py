"""`dpal preview`: pictures of views, masks and features into `previews/` of the run folder."""

import hashlib
import json

import numpy as np
import torch
from PIL import Image

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.composites import Composer
from data_tools.decode import decode_rgb
from data_tools.feature_cache import open_cache
from data_tools.manifest import Manifest, ShardRef, manifest_of
from data_tools.shard import read_shard
from data_tools.storage import ObjectStore, open_store
from dpal.base.errors import DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.base.saip import Saip
from dpal.model.student import FrozenStudent
from dpal.model.tokens import Tokens
from dpal.saip.views import SaipPlan
from dpal.targets.header import TargetHeader
from dpal.views.plan import ViewPlan
from jobs.backbones import last_checkpoint, student_of
from jobs.caching.plan import definition_of, teacher_of
from jobs.previews.index import Preview, PreviewIndex, read_previews, write_index
from jobs.previews.of_tokens import (
    draw_features,
    draw_masks,
    draw_own_features,
    draw_similarity,
    tokens_of,
)
from jobs.previews.of_views import draw_composites, draw_views
from jobs.previews.saip import draw_saip
from jobs.previews.sample import Drawn, Sample, make_sample
from jobs.publish import new_folder
from jobs.stage import StageResult

VERSION = 3  # raise it whenever the same inputs would give other pictures
NUM_IMAGES = 8


def run(recipe: Recipe) -> StageResult:
    """Draw what the method has: views, masks with a teacher, features with a checkpoint too.

    Of several teachers the first is drawn.

    Raises:
        DataError: when there are no shards yet.
    """
    folder = RunLayout(recipe.run_dir).previews
    store = open_store(recipe.data.shards, recipe.storage)
    manifest = manifest_of(recipe)
    pool = load_backgrounds(recipe)
    header = _header(recipe, manifest, pool)
    digest = _digest(recipe, manifest, header)
    present = read_previews(folder)
    if present is not None and present.digest == digest:
        return StageResult("preview", True, f"{len(present.previews)} pictures in {folder}")
    keys, images = sample_images(recipe, store, manifest.shards[0], NUM_IMAGES)
    plan = ViewPlan(recipe.seed, recipe.views)
    composer = Composer(plan, pool) if _has_composites(recipe) else None
    drawn = _draw(recipe, make_sample(plan, keys, images, composer), header)
    if isinstance(recipe.method, Saip):
        own = SaipPlan(recipe.seed + recipe.train.seed, recipe.views, recipe.method.local_crops)
        drawn = [*draw_saip(own, keys, images, pool.images), *drawn]
    with new_folder(folder) as aside:
        for one in drawn:
            Image.fromarray(one.picture).save(aside / f"{one.kind}.png")
        previews = tuple(
            Preview(aside / f"{one.kind}.png", one.kind, one.title, one.caption) for one in drawn
        )
        write_index(aside, PreviewIndex(digest, previews))
    names = ", ".join(one.kind for one in drawn)
    return StageResult("preview", False, f"{len(drawn)} pictures in {folder}: {names}")


def _draw(recipe: Recipe, sample: Sample, header: TargetHeader | None) -> list[Drawn]:
    """Only what the method makes use of; without a teacher, only what it sees."""
    composites, method = _has_composites(recipe), recipe.method.kind
    drawn = [] if method == "saip" else [draw_views(sample)]
    if composites:
        drawn.append(draw_composites(sample))
    checkpoint, student = last_checkpoint(recipe), None
    if checkpoint is not None:
        student = FrozenStudent(student_of(recipe.student, checkpoint), recipe.views.height)
    if not _has_teacher(recipe):
        if student is not None:
            drawn.append(draw_own_features(sample, tokens_of(student, sample.bases)))
        return drawn
    teacher = teacher_of(recipe).to("cuda" if torch.cuda.is_available() else "cpu")

    def tokens(views: np.ndarray) -> tuple[Tokens, Tokens | None]:
        return tokens_of(teacher, views), student and tokens_of(student, views)

    single, own = tokens(sample.bases)
    if method == "dpal" and recipe.loss.shape:
        drawn.append(draw_masks(sample, single, header, recipe.loss.shape_mask))
    drawn.append(draw_features(sample, single, own))
    if composites:
        drawn.append(draw_similarity(sample, *tokens(sample.composites)))
    return drawn


def _has_composites(recipe: Recipe) -> bool:
    return recipe.method.kind == "dpal" and recipe.loss.relation > 0


def sample_images(
    recipe: Recipe, store: ObjectStore, ref: ShardRef, count: int
) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """Keys and pixels of `count` images spread evenly over one shard."""
    shard = read_shard(store, ref, None)
    chosen = np.linspace(0, len(shard.keys) - 1, min(count, len(shard.keys))).astype(int)
    keys = tuple(shard.keys[index] for index in chosen)
    limit = recipe.data.max_pixels
    images = tuple(decode_rgb(shard.image_bytes(int(index)), limit) for index in chosen)
    return keys, images


def _header(recipe: Recipe, manifest: Manifest, pool: BackgroundPool) -> TargetHeader | None:
    """Header of the recipe's target cache; None while there is no such cache."""
    if not _has_teacher(recipe):
        return None
    try:
        return open_cache(recipe, definition_of(recipe, manifest, pool)).header
    except DataError:
        return None


def _has_teacher(recipe: Recipe) -> bool:
    """False without a teacher, and where a taught one is not taught yet."""
    if recipe.teacher is None:
        return False
    return recipe.teacher.kind != "taught" or RunLayout(recipe.run_dir).teacher.is_file()


def _digest(recipe: Recipe, manifest: Manifest, header: TargetHeader | None) -> str:
    checkpoint = last_checkpoint(recipe)
    inputs = {
        "version": VERSION,
        "recipe": recipe.digest(),
        "manifest": manifest.digest,
        "teacher": _has_teacher(recipe),
        "targets": header.digest if header is not None else "",
        "checkpoint": checkpoint.digest if checkpoint is not None else "",
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
