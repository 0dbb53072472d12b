"""What a recipe means for its targets: the teacher, the definition, and who is the cache."""

from data_tools.backgrounds import BackgroundPool
from data_tools.feature_cache import TargetCache, open_cache
from data_tools.manifest import Manifest
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.base.students import PATCH
from dpal.base.telemetry import Telemetry
from dpal.model.teacher import Teacher, build_teacher, teacher_identity
from dpal.targets import TargetDefinition
from dpal.views import ViewPlan


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
    """The recipe's complete cache, for training. Raises DataError when it is not complete."""
    cache = open_cache(recipe, definition_of(recipe, manifest, pool), telemetry)
    cache.require_complete(manifest)
    return cache
