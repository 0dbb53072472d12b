"""What a recipe means for its targets: the teacher, the definition, and who is the cache.

A recipe with several teachers has one cache for each: the functions below take a recipe with one
teacher, as `single_teacher_recipes` gives them.
"""

import numpy as np

from data_tools.backgrounds import BackgroundPool
from data_tools.covariance import COVARIANCE
from data_tools.feature_cache import HEADER, TargetCache, open_cache
from data_tools.manifest import Manifest, manifest_of
from data_tools.storage import ObjectStore
from dpal import rotation
from dpal.base.codec import parse_codec
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.base.students import PATCH
from dpal.base.teachers import teacher_name
from dpal.base.telemetry import Telemetry
from dpal.model.teacher import Teacher, build_teacher, teacher_identity
from dpal.phi_s import require_hadamard
from dpal.targets.header import TargetDefinition
from dpal.views.plan import ViewPlan


def single_teacher_recipes(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe once for each of its teachers, in order; none for a method without a teacher."""
    return tuple(recipe.with_teacher(teacher) for teacher in recipe.teachers)


def teacher_names(recipe: Recipe) -> tuple[str, ...]:
    """What each teacher is called in tables: `teacher`, or `teacher <name>` among several.

    The name is the network's, or else the weights file's, or else the kind; equal ones are
    numbered.
    """
    if len(recipe.teachers) < 2:
        return ("teacher",) * len(recipe.teachers)
    plain = [teacher_name(teacher) for teacher in recipe.teachers]
    return tuple(
        f"teacher {name}"
        if plain.count(name) == 1
        else f"teacher {name} {plain[:i].count(name) + 1}"
        for i, name in enumerate(plain)
    )


def stride_of(recipe: Recipe) -> int:
    """Pixels of a view behind one token of the student."""
    return PATCH * recipe.views.height // recipe.student.height


def teacher_of(recipe: Recipe) -> Teacher:
    """The recipe's frozen teacher, on the CPU. Raises ConfigError or DataError."""
    return build_teacher(
        recipe.teacher,
        stride=stride_of(recipe),
        view_size=(recipe.views.height, recipe.views.width),
        taught_weights=RunLayout(recipe.run_dir).teacher,
    )


def definition_of(recipe: Recipe, manifest: Manifest, pool: BackgroundPool) -> TargetDefinition:
    """What the recipe's cache is of; cheap: the teacher's file is hashed, not loaded."""
    views, stride = recipe.views, stride_of(recipe)
    identity = teacher_identity(
        recipe.teacher,
        RunLayout(recipe.run_dir).teacher,
        view_size=(views.height, views.width),
    )
    return TargetDefinition(
        teacher=identity,
        views=ViewPlan(recipe.seed, views).describe(),
        grid=(views.height // stride, views.width // stride),
        composite_grid=(views.height // stride, views.height // stride),
        codec=recipe.cache.codec,
        manifest=manifest.digest,
        backgrounds=pool.digest,
        calibration_images=recipe.cache.calibration_images,
    )


def cache_of(
    recipe: Recipe,
    manifest: Manifest,
    pool: BackgroundPool,
    telemetry: Telemetry | None = None,
) -> TargetCache:
    """The recipe's cache, for training on `manifest`: all of its shards, or a part of them.

    Raises:
        DataError: when targets of one of the shards are missing.
    """
    whole = manifest_of(recipe) if recipe.train.partial else manifest
    cache = open_cache(recipe, definition_of(recipe, whole, pool), telemetry)
    cache.require_complete(manifest)
    return cache


def is_calibrated(store: ObjectStore, recipe: Recipe) -> bool:
    """Whether a cache folder has all of its calibration that the recipe needs.

    A cache that was made without the covariance lacks nothing until PHI-S asks for it.
    """
    with_covariance = recipe.loss.targets != "phi-s" or store.exists(COVARIANCE)
    return with_covariance and store.exists(HEADER)


def require_width(recipe: Recipe, width: int) -> None:
    """Raise ConfigError when codec or target space do not fit a teacher of `width` channels."""
    rotation.require_width(parse_codec(recipe.cache.codec), width)
    if recipe.loss.targets == "phi-s":
        require_hadamard(width, "loss.targets=phi-s", "loss.targets=standardised")


def covariance_of(recipe: Recipe, cache: TargetCache) -> np.ndarray | None:
    """The covariance if the recipe's target space needs it. Raises DataError when it is missing."""
    return cache.covariance() if recipe.loss.targets == "phi-s" else None
