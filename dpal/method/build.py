"""The method that a recipe names, as a Task."""

from collections.abc import Sequence
from pathlib import Path

from dpal.base.recipe import Recipe
from dpal.method.dpal import DpalTask
from dpal.method.mse import MseTask
from dpal.method.proteus import ProteusTask
from dpal.method.saip import SaipTask
from dpal.method.tinymim import TinyMimTask
from dpal.target_source import TargetSource
from dpal.task import Task


def build_task(recipe: Recipe, sources: Sequence[TargetSource], taught_weights: Path) -> Task:
    """The task of `method.kind`.

    Args:
        sources: targets of every teacher of the recipe, in order.
        taught_weights: file of the taught teacher, if the recipe has one.

    Raises:
        ConfigError: when student, teachers and method do not fit together.
    """
    kind, sources = recipe.method.kind, tuple(sources)
    if kind == "saip":
        return SaipTask(recipe)
    if kind == "mse":
        return MseTask(recipe, sources)
    if kind == "proteus":
        return ProteusTask(recipe, sources)
    if kind == "tinymim":
        from dpal.model.relation_target import attention_projection

        frozen = [attention_projection(teacher, taught_weights) for teacher in recipe.teachers]
        return TinyMimTask(recipe, sources, frozen)
    return DpalTask(recipe, sources)
