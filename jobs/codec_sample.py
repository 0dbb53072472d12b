"""What one teacher says about a sample of a recipe's images, exactly and through a codec.

Legend: B samples of a batch, N patches, D teacher width.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from data_tools.backgrounds import load_backgrounds
from data_tools.manifest import manifest_of
from dpal.alignment import AlignmentTask
from dpal.base.codec import parse_codec
from dpal.base.errors import ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.calibration import Calibration, fit_calibration
from dpal.method.build import build_task
from dpal.model.tokens import Tokens
from dpal.ranks import World
from dpal.record import SPEC_NUMBERS, Kind
from dpal.rotation import Rotation, require_width
from dpal.target_source import GivenTargets, OnlineTargets, Targets
from dpal.targets.coding import decode_batch, encode_batch
from dpal.targets.header import TargetDefinition, TargetHeader
from dpal.task import Moment, Task
from jobs.caching.plan import definition_of, teacher_of
from jobs.train import make_loader

BATCH = 16


class Sample(NamedTuple):
    """A sample of images, the teacher's exact tokens of them, and a student that learns from both.

    Attributes:
        batches: what the loader made of the images.
        exact: the teacher's tokens of every batch.
        calibration: fitted on other images, like that of a cache.
        source: where `task` looks targets up.
        task: the recipe's method with the student's start values.
        moment: step 0 of the recipe's run.
        calibration_images: images that `calibration` was fitted on.
        disjoint: whether those are no images of the sample.
    """

    batches: list[TrainBatch]
    exact: list[Targets]
    calibration: Calibration
    source: GivenTargets
    task: Task
    moment: Moment
    calibration_images: int
    disjoint: bool

    @property
    def num_images(self) -> int:
        """Images of the sample."""
        return sum(len(batch.keys) for batch in self.batches)

    def header(self, word: str) -> TargetHeader:
        """The header of a cache with this codec. Raises ConfigError when it does not fit."""
        header, codec = self.calibration.header, parse_codec(word)
        turn = Rotation.fit(codec, header.patch_mean, self.calibration.covariance)
        return replace(header, definition=replace(header.definition, codec=word), rotation=turn)

    def losses(self, targets: list[Targets]) -> torch.Tensor:
        """Mean of every term of the task over the sample: float64 [T]."""
        terms = []
        with torch.no_grad():
            for batch, given in zip(self.batches, targets, strict=True):
                self.source.targets = given
                terms.append(self.task(batch, self.moment).terms.double())
        return torch.stack(terms).mean(dim=0)


def draw_sample(recipe: Recipe, num_images: int, words: Sequence[str] = ()) -> Sample:
    """Take images of the run's own order: first those that are calibrated on, then the sample.

    A data set too small for both is halved; one of fewer images than two batches is used twice.

    Args:
        recipe: with one teacher.
        words: codecs that its teacher has to fit.

    Raises:
        ConfigError: a method without targets, or a teacher that does not fit it or a codec.
        DataError: missing or damaged images.
    """
    if not recipe.aligned_teachers:
        raise ConfigError(
            f"method.kind={recipe.method.kind} has no targets that a codec could hold"
        )
    recipe = _online(recipe)
    manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
    if not manifest.num_samples:
        raise DataError(f"no images in {recipe.data.shards!r}")
    calibrated, measured, disjoint = _shares(
        manifest.num_samples, recipe.cache.calibration_images, num_images
    )
    teacher = teacher_of(recipe).to("cuda" if torch.cuda.is_available() else "cpu")
    for word in words:  # before the teacher has looked at anything
        require_width(parse_codec(word), teacher.width)
    definition = replace(definition_of(recipe, manifest, pool), codec="fp32")
    # The loader asks a task which views it looks at, before there are statistics for it.
    blank = GivenTargets(_blank(definition, teacher.width), np.eye(teacher.width))
    taught_weights = RunLayout(recipe.run_dir).teacher
    looks = build_task(recipe, [blank], taught_weights)
    loader = make_loader(recipe, manifest, pool, looks, [], World(0, 1, 0))
    source, device = OnlineTargets(teacher, blank.header), torch.device("cpu")
    stream = loader.batches(0)
    try:
        seen = [_arrays(source(batch, device).base) for batch in islice(stream, calibrated)]
        cls, patches = (np.concatenate(part) for part in zip(*seen, strict=True))
        calibration = fit_calibration(definition, cls, patches, ["sample"])
        if not disjoint:
            stream.close()  # type: ignore[attr-defined]
            stream = loader.batches(0)
        batches = list(islice(stream, measured))
    finally:
        stream.close()  # type: ignore[attr-defined]
    exact = [source(batch, device) for batch in batches]
    given = GivenTargets(calibration.header, calibration.covariance)
    task = _looking_once(build_task(recipe, [given], taught_weights))
    moment = Moment(0, 1000, manifest.num_samples, recipe.train.global_batch)
    return Sample(batches, exact, calibration, given, task, moment, calibrated * BATCH, disjoint)


def through(header: TargetHeader, tokens: Tokens, kind: Kind) -> Tokens:
    """Tokens after they were written as records and read back."""
    cls, patches = _arrays(tokens)
    specs = np.zeros((len(cls), SPEC_NUMBERS[kind]), dtype=np.uint16)
    return decode_batch(encode_batch(cls, patches, specs, header, kind), header, kind)


def _blank(definition: TargetDefinition, width: int) -> TargetHeader:
    """A header without statistics."""
    zeros, ones = np.zeros(width, np.float32), np.ones(width, np.float32)
    return TargetHeader(definition, width, zeros, ones, zeros, ones, ones, 0.0, 1.0, "")


def _arrays(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    return tokens.cls.numpy(), tokens.patches.numpy()


def _looking_once(task: Task) -> Task:
    """The task, which remembers what its student says about a batch: every codec asks again."""
    assert isinstance(task, AlignmentTask)
    look, remembered = task.look, dict[tuple[str, ...], object]()

    def looked(batch: TrainBatch, moment: Moment) -> object:
        if batch.keys not in remembered:
            remembered[batch.keys] = look(batch, moment)
        return remembered[batch.keys]

    task.look = looked  # type: ignore[method-assign]
    return task


def _shares(total: int, calibration: int, sample: int) -> tuple[int, int, bool]:
    """Batches for the calibration, batches for the sample, and whether they share no image."""
    batches = total // BATCH
    if batches < 2:
        return 1, 1, False
    first = min(-(-calibration // BATCH), batches // 2)
    return first, min(-(-sample // BATCH), batches - first), True


def _online(recipe: Recipe) -> Recipe:
    """The recipe as one process that reads batches of `BATCH` and asks the teacher."""
    train = {"targets": "online", "processes": 1, "render": "loader", "precision": "fp32"}
    sizes = {"global_batch": BATCH, "micro_batch": BATCH}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={**train, **sizes})})
