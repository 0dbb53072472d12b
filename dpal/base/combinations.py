"""Which combinations of sections make no sense for a method, each as one sentence.

A recipe is refused when it is read: not after its targets were computed for hours.
"""

from typing import TYPE_CHECKING

from dpal.base import saip
from dpal.base.methods import Proteus, TinyMim

if TYPE_CHECKING:
    from dpal.base.recipe import Recipe

# Weights by method; a method whose weights are all 0 learns nothing.
_WEIGHTS = {
    "mse": ("identity", "shape"),
    "proteus": ("token", "feature", "patch"),
    "tinymim": ("qk", "vv"),
    "saip": ("representation", "attention", "reconstruction", "instance", "region"),
}


def misfit(recipe: "Recipe") -> str:
    """What does not fit together in a recipe; empty when all does."""
    method = recipe.method
    reason = _training(recipe)
    if not reason and isinstance(method, Proteus):
        reason = _proteus(recipe, method)
    if not reason and isinstance(method, TinyMim):
        reason = _tinymim(recipe)
    if not reason and method.kind == "saip":
        reason = saip.misfit(recipe) or _without_teacher(recipe)
    return reason or _weightless(recipe) or _twice(recipe) or _idle(recipe)


def _training(recipe: "Recipe") -> str:
    train = recipe.train
    for key in ("start_lr", "end_lr"):
        if getattr(train, key) > train.lr:
            return (
                f"train.{key}={getattr(train, key)} is above the peak train.lr={train.lr}; "
                "accepted are values up to it"
            )
    if train.partial and (train.targets == "online" or not recipe.aligned_teachers):
        return (
            "train.partial=true has no effect without cached targets; accepted is to leave it out, "
            "or train.targets=cached with a method that has targets"
        )
    return ""


def _proteus(recipe: "Recipe", method: Proteus) -> str:
    if recipe.student.family != "vit":
        return (
            f"student.name={recipe.student.name}: method.kind=proteus masks input patches; "
            "accepted are vit_tiny, vit_small and vit_base"
        )
    for key in ("mask_probability", "mask_ratio"):
        value = getattr(method, key)
        if not method.patch and value != Proteus.model_fields[key].default:
            return (
                f"method.{key}={value} has no effect with method.patch=0; accepted is to leave it "
                "out, or a positive weight"
            )
    return ""


def _tinymim(recipe: "Recipe") -> str:
    student = recipe.student
    if student.family != "vit":
        return (
            f"student.name={student.name}: method.kind=tinymim compares attention relations; "
            "accepted are vit_tiny, vit_small and vit_base"
        )
    if student.heads == "timm":
        return (
            "student.heads=timm with method.kind=tinymim: the last block needs as many heads as "
            "the teacher's; accepted is student.heads=paper with that number in student.last_heads"
        )
    if recipe.train.zero_stage == 3:
        return (
            "train.zero_stage=3 with method.kind=tinymim: relations are read inside the student, "
            "where its parameters are not gathered; accepted are 0, 1 and 2"
        )
    for teacher in recipe.teachers:
        tap = getattr(teacher, "tap", "")
        if not tap.startswith("block"):
            shown = f"teacher.tap={tap} of a teacher" if tap else "a teacher"
            return (
                f"{shown} of teacher.kind={teacher.kind} has no attention behind it to imitate; "
                "accepted with method.kind=tinymim are ViT teachers with teacher.tap=block<k>"
            )
    return ""


def _without_teacher(recipe: "Recipe") -> str:
    if recipe.train.targets == "online":
        return (
            "train.targets=online has no effect with method.kind=saip, which has no targets; "
            "accepted is to leave it out"
        )
    if recipe.train.render == "device":
        return (
            "train.render=device has no effect with method.kind=saip, whose views the loader "
            "renders; accepted is train.render=loader"
        )
    return ""


def _weightless(recipe: "Recipe") -> str:
    kind = recipe.method.kind
    names = _WEIGHTS.get(kind, ())
    if names and not any(getattr(recipe.method, name) for name in names):
        listed = ", ".join(f"method.{name}" for name in names)
        return f"{listed} are all 0; accepted is a positive weight for one of them at least"
    return ""


def _twice(recipe: "Recipe") -> str:
    for number, teacher in enumerate(recipe.more_teachers):
        if teacher in recipe.teachers[: number + 1]:
            return (
                f"more_teachers.{number} is the same as a teacher before it; accepted are "
                "teachers that differ"
            )
    return ""


def _idle(recipe: "Recipe") -> str:
    """Keys of DPAL's losses whose weight is 0, and of a decoder that has no such part."""
    loss, decoder = recipe.loss, recipe.decoder
    if recipe.method.kind != "dpal":
        return ""
    for key, weight in (("shape_mask", "shape"), ("affinity", "relation")):
        value = getattr(loss, key)
        if not getattr(loss, weight) and value != type(loss).model_fields[key].default:
            return (
                f"loss.{key}={value} has no effect with loss.{weight}=0; accepted is to leave it "
                "out, or a positive weight"
            )
    if decoder.kind == "shared" and decoder.patterns != 3:
        return (
            f"decoder.patterns={decoder.patterns} has no effect with decoder.kind=shared, which is "
            "one layer for every pattern; accepted is to leave it out"
        )
    return ""
