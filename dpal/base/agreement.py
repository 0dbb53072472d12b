"""Whether the sections of a recipe agree with each other, told in one sentence.

What a method cannot work with is in `dpal.base.combinations`.
"""

from typing import TYPE_CHECKING, Any

from dpal.base.inputs import Data
from dpal.base.losses import Loss
from dpal.base.section import Section

if TYPE_CHECKING:
    from dpal.base.recipe import Recipe


def disagreement(recipe: "Recipe") -> str:
    """Where two sections contradict each other; empty when they do not."""
    reason = _sizes(recipe) or _teachers(recipe) or _composites(recipe) or _average(recipe)
    if reason:
        return reason
    if recipe.method.kind == "dpal":
        return _losses(recipe) or _experts(recipe) or _instances(recipe)
    return _losses_without_effect(recipe)


def default_of(section: type[Section], key: str) -> Any:
    """What a key is when a recipe leaves it out."""
    return section.model_fields[key].default


def _sizes(recipe: "Recipe") -> str:
    student, views = recipe.student, recipe.views
    fits = student.height == 2 * student.width and not views.height % student.height
    if fits and not student.height % 128:
        return ""
    return (
        f"student.height={student.height}, student.width={student.width}: accepted are multiples "
        f"of 128 that divide views.height={views.height}, and a width of half the height"
    )


def _teachers(recipe: "Recipe") -> str:
    kind = recipe.method.kind
    if recipe.teacher is None and (kind != "saip" or recipe.more_teachers):
        return f"method.kind={kind} needs a teacher; accepted without one is saip"
    taught = [teacher for teacher in recipe.teachers if teacher.kind == "taught"]
    if taught and recipe.data.images != ("synthetic",):
        return "teacher.kind=taught needs data.images=['synthetic']"
    if len(taught) > 1:
        return "two teachers are of teacher.kind=taught; accepted is one in a recipe"
    drop = recipe.loss.teacher_drop
    if drop != default_of(Loss, "teacher_drop") and len(recipe.teachers) < 2:
        return f"loss.teacher_drop={drop} has no effect without more_teachers"
    compared = kind != "tinymim" and recipe.aligned_teachers  # relations are of one scale
    if compared and len(recipe.teachers) > 1 and drop and recipe.loss.targets == "raw":
        return (
            "loss.targets=raw with more_teachers and teacher dropping compares losses of unlike "
            "scale; accepted are phi-s and standardised, or loss.teacher_drop=0"
        )
    return ""


def _composites(recipe: "Recipe") -> str:
    data, views = recipe.data, recipe.views
    real = views.composite == "scenes"
    if real and not data.scenes:
        return "views.composite=scenes needs data.scenes, folders of images of several persons"
    for key in ("backgrounds",) if real else ("scenes", "max_scenes"):
        value = getattr(data, key)
        if value != default_of(Data, key):
            return (
                f"data.{key}={value} has no effect with views.composite={views.composite}; "
                "accepted is to leave it out"
            )
    if recipe.method.kind == "saip":
        for key, value in (("composite", views.composite), ("photometric", views.photometric)):
            if value not in ("same", "free", "off"):
                return (
                    f"views.{key}={value} has no effect with method.kind=saip, which makes its "
                    "own scenes and pins no view; accepted is to leave it out"
                )
    return ""


def _average(recipe: "Recipe") -> str:
    if recipe.train.ema and recipe.train.zero_stage == 3:
        return (
            f"train.ema={recipe.train.ema} needs whole parameters on every process; accepted are "
            "train.zero_stage=0, 1 and 2, or train.ema=0"
        )
    return ""


def _losses(recipe: "Recipe") -> str:
    loss = recipe.loss
    if not loss.identity + loss.shape + loss.relation:
        return (
            "loss.identity, loss.shape and loss.relation are all 0; accepted is a positive weight "
            "for one of them at least"
        )
    if loss.relation and not recipe.views.composites:
        return (
            f"loss.relation={loss.relation} needs composites; accepted are views.composites of 1 "
            "and more, or loss.relation=0"
        )
    if loss.crop_patches and not loss.shape:
        return (
            "loss.crop_patches=True has no effect with loss.shape=0; accepted is to leave it out, "
            "or a positive weight"
        )
    return ""


def _experts(recipe: "Recipe") -> str:
    loss, decoder = recipe.loss, recipe.decoder
    if loss.relation and decoder.patterns == 2:
        return (
            f"decoder.patterns=2 has no expert for loss.relation={loss.relation}; accepted are "
            "decoder.patterns=3, or loss.relation=0"
        )
    for key in ("router", "router_late", "router_switch", "expert"):
        value = getattr(loss, key)
        if decoder.kind != "dynamic" and value != default_of(Loss, key):
            return (
                f"loss.{key}={value} has no effect with decoder.kind={decoder.kind}; accepted is "
                "to leave it out, or decoder.kind=dynamic"
            )
    return ""


def _instances(recipe: "Recipe") -> str:
    loss, composite = recipe.loss, recipe.views.composite
    if loss.relation_level == "tokens":
        return ""
    if composite != "scenes":
        return (
            "loss.relation_level=instances needs boxes of persons, which views.composite="
            f"{composite} does not have; accepted is views.composite=scenes"
        )
    if not loss.relation:
        return (
            "loss.relation_level=instances has no effect with loss.relation=0; accepted is to "
            "leave it out, or a positive weight"
        )
    if loss.affinity != "log_softmax":
        return (
            f"loss.affinity={loss.affinity} is the reference's relation of tokens; accepted with "
            "loss.relation_level=instances is log_softmax"
        )
    return ""


def _losses_without_effect(recipe: "Recipe") -> str:
    kept = {"targets", "teacher_drop"}  # of every method that has teachers
    for name, section in (("decoder", recipe.decoder), ("loss", recipe.loss)):
        for key in type(section).model_fields.keys() - kept:
            value = getattr(section, key)
            if value != default_of(type(section), key):
                return (
                    f"{name}.{key}={value} has no effect with method.kind={recipe.method.kind}; "
                    "accepted is to leave it out, or method.kind=dpal"
                )
    return ""
