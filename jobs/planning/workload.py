"""What a recipe asks for, as the numbers of a `Workload`; reads the manifest if there is one.

Imports no torch: the width of a teacher comes from the rates file.

Legend: M images of a shard, D teacher width, r components of a codec's rotation.
"""

import math
from typing import NamedTuple

from data_tools.manifest import Manifest, manifest_of
from data_tools.order import num_lanes
from data_tools.storage import is_remote
from data_tools.tar import BLOCK
from data_tools.target_tar import END, stride_of
from dpal.base.codec import parse_codec
from dpal.base.errors import ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.base.students import PATCH
from dpal.base.teachers import TaughtTeacher, Teacher, teacher_name
from dpal.record import Kind, RecordLayout
from jobs.planning.rates import Rates
from jobs.planning.types import Series, TeacherTargets, Workload

_RECORD = 10_240  # a tar that is written as a stream ends at a multiple of it
_FLOAT_TEXT = 25  # bytes of a number in the header's JSON, with its line end


class Size(NamedTuple):
    """What the command line says; None where it says nothing."""

    images: int | None = None
    students: int = 1
    epochs: float | None = None
    devices: int | None = None


def workload(recipe: Recipe, rates: Rates, size: Size) -> Workload:
    """The workload of a recipe at a size.

    Raises:
        ConfigError: no number of images, or rates of another number of teachers.
    """
    manifest = _manifest(recipe, size)
    images = size.images or _num_images(recipe, manifest)
    per_shard = recipe.data.samples_per_shard
    if manifest is not None:
        image_bytes = sum(ref.num_bytes for ref in manifest.shards) / manifest.num_samples
        per_shard = max(ref.num_samples for ref in manifest.shards)
        if images != manifest.num_samples:
            per_shard = recipe.data.samples_per_shard
    else:
        image_bytes = sharded_bytes(rates.image_bytes, min(images, per_shard))
    return Workload(
        images=images,
        samples_per_shard=per_shard,
        image_bytes=image_bytes,
        tar_end_bytes=END,
        teachers=_targets(recipe, rates),
        uses_composite=recipe.method.kind == "dpal" and recipe.loss.relation > 0,
        calibration_images=min(recipe.cache.calibration_images, images),
        epochs=size.epochs or _epochs(recipe, images),
        students=size.students,
        devices=size.devices or rates.node.devices,
        lanes=num_lanes(recipe.train.lanes, recipe.train.global_batch),
        window=recipe.train.window,
        copies_bytes=recipe.storage.copies_gb * 1e9,
        remote_shards=is_remote(recipe.data.shards),
        remote_targets=is_remote(recipe.cache.url),
        parity_samples=recipe.train.parity_samples,
    )


def sharded_bytes(image: float, per_shard: int) -> float:
    """Mean bytes of a sample in a shard of M: two headers, the image, its JSON, and the tar's end.

    The image is padded to whole blocks, by half a block in the mean; the JSON fills one.
    """
    end = 2 * BLOCK + (_RECORD - BLOCK) / 2
    return image + BLOCK / 2 + 3 * BLOCK + end / per_shard


def num_patches(recipe: Recipe, kind: Kind) -> int:
    """Tokens of a target: the student's grid on the view; a composite is as wide as high."""
    rows, columns = recipe.student.height // PATCH, recipe.student.width // PATCH
    return rows * (columns if kind == "view" else rows)


def _targets(recipe: Recipe, rates: Rates) -> tuple[TeacherTargets, ...]:
    teachers = recipe.aligned_teachers
    if len(teachers) != len(rates.teachers):
        raise ConfigError(
            f"the recipe learns from {len(teachers)} teachers, the rates are of "
            f"{len(rates.teachers)}: measure them for this recipe (`dpal plan RECIPE --measure "
            "FILE`), or list each under `teachers`"
        )
    return tuple(
        _teacher_targets(recipe, teacher, rate.width)
        for teacher, rate in zip(teachers, rates.teachers, strict=True)
    )


def _teacher_targets(recipe: Recipe, teacher: Teacher, width: int) -> TeacherTargets:
    if isinstance(teacher, TaughtTeacher) and teacher.width != width:
        raise ConfigError(
            f"rates: teachers: width={width}, but the recipe says teacher.width={teacher.width}"
        )
    codec, views = parse_codec(recipe.cache.codec), recipe.views
    codec.require_width(width)

    def series(kind: Kind, count: int) -> Series:
        layout = RecordLayout(kind, codec.word, width, num_patches(recipe, kind))
        return Series(count, layout.num_bytes, stride_of(layout))

    rotation = 0 if codec.turn == "none" else codec.channels(width)
    header = 5 * _FLOAT_TEXT * width + 4 * 4 * rotation * width // 3  # base64 of float32 [r, D]
    covariance = 8 * width * width
    return TeacherTargets(
        name=teacher_name(teacher),
        base=series("view", views.count),
        composite=series("composite", views.composites),
        fixed_bytes=header + covariance,
    )


def _manifest(recipe: Recipe, size: Size) -> Manifest | None:
    """The manifest; a store in the network is only asked when the size is not given."""
    if size.images and is_remote(recipe.data.shards):
        return None
    try:
        return manifest_of(recipe)
    except DataError:
        return None


def _num_images(recipe: Recipe, manifest: Manifest | None) -> int:
    if manifest is not None:
        return manifest.num_samples
    if tuple(recipe.data.images) == ("synthetic",):
        drawn = recipe.data.synthetic
        return drawn.identities * drawn.images_per_identity
    raise ConfigError(
        f"there are no shards in {recipe.data.shards!r} to count: say --images N, or run "
        "`dpal shard` first"
    )


def _epochs(recipe: Recipe, images: int) -> float:
    number, unit = recipe.train.duration.split()
    epochs = float(number)
    if unit == "steps":
        epochs *= recipe.train.global_batch / images
    if not math.isfinite(epochs) or epochs <= 0:
        raise ConfigError(f"train.duration={recipe.train.duration}: there is nothing to plan")
    return epochs
