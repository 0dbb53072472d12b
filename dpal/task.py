"""The Task: what turns a batch into losses. Every method of the field has this one interface.

`AlignmentTask` is the common part of the methods that align a student with frozen teachers: it
looks up the targets of every teacher, adds their losses, and drops teachers. The methods
themselves are in `dpal/method/`, one file each.

Legend: B samples, T terms, M teachers, D teacher width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dpal.augment import noisy_pixels
from dpal.average import MovingAverage
from dpal.base.recipe import Recipe, steps_of
from dpal.batch import Batch, Needs, TrainBatch
from dpal.chance import generator
from dpal.dropping import kept_teachers
from dpal.model.student import build_student
from dpal.model.tokens import FrozenBackbone, Tokens
from dpal.pixels import student_pixels
from dpal.target_space import target_space
from dpal.targets import TargetHeader, decode_batch


class Losses(NamedTuple):
    """Result of one micro-batch.

    Attributes:
        total: weighted sum, with gradient.
        terms: detached values in the order of the task's `terms` [T]; unweighted but for the sum.
        diagnostics: small detached tensors by name, the same names in every step.
    """

    total: Tensor
    terms: Tensor
    diagnostics: Mapping[str, Tensor]


class Moment(NamedTuple):
    """Where in the run a step is.

    Attributes:
        step: optimiser steps done before this one.
        total_steps: length of the run.
        num_samples: size of the data set.
        global_batch: samples of one step.
    """

    step: int
    total_steps: int
    num_samples: int
    global_batch: int

    def steps(self, duration: str) -> int:
        """Optimiser steps in "300 steps" or "1.5 epochs"."""
        return steps_of(duration, self.num_samples, self.global_batch)


class Task(nn.Module):
    """A student, what it is trained with, and the losses of a method.

    Top-level parts: `student` is kept; `decoder` is everything that is discarded afterwards;
    `average` is the student's moving average, if the recipe asks for one.

    Attributes:
        terms: names of `Losses.terms`; the first is `loss`, the weighted sum.
    """

    terms: tuple[str, ...] = ("loss",)

    def __init__(self, recipe: Recipe, *, masked: bool = False) -> None:
        super().__init__()
        self.seed = recipe.seed + recipe.train.seed
        self.student = build_student(recipe.student, self.seed, masked=masked)
        self.shrink = recipe.views.height // recipe.student.height
        self.average: MovingAverage | None = None
        if recipe.train.ema:
            self.average = MovingAverage(self.student, recipe.train.ema)

    def forward(self, batch: Batch, moment: Moment) -> Losses:
        """Losses of one micro-batch."""
        raise NotImplementedError

    def after_step(self, moment: Moment) -> None:
        """Update what follows the parameters instead of being trained."""
        if self.average is not None:
            self.average.update(self.student)

    @contextmanager
    def paths(self, keys: Sequence[str], moment: Moment, call: int) -> Iterator[None]:
        """Within: the student drops paths as these samples' own choice in this step.

        Args:
            keys: sample keys, one for every row that goes through the student.
            call: tells forwards of the same samples in one step apart.
        """
        places = self.student.num_drop_paths
        if not places:
            yield
            return
        draws = [
            generator(self.seed, "drop-path", key, moment.step, call, row // len(set(keys))).random(
                places, dtype=np.float32
            )
            for row, key in enumerate(keys)
        ]
        with self.student.dropping(torch.from_numpy(np.stack(draws))):
            yield

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    def pixels(self, views: np.ndarray, noise: np.ndarray) -> Tensor:
        """The student's input of uint8 views [B, H, W, 3] with colour noise [B, 6]."""
        return student_pixels(views, noise, self.shrink, self.device)


class Targets(NamedTuple):
    """What one teacher says about a batch.

    Attributes:
        base: tokens of the base views.
        composite: tokens of the composites; None when the task does not need them.
    """

    base: Tokens
    composite: Tokens | None


class TargetSource(Protocol):
    """Where one teacher's targets come from; a task cannot tell a cache from a teacher.

    Attributes:
        header: width, grid and statistics of the targets.
        covariance: of the patch tokens [D, D]; None unless the target space needs it.
    """

    header: TargetHeader
    covariance: np.ndarray | None

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets: ...


class CachedTargets:
    """Targets dequantised from the records that came with the batch.

    Args:
        teacher: index of the teacher in the recipe, and in `TrainBatch.records`.
    """

    def __init__(
        self, header: TargetHeader, teacher: int = 0, covariance: np.ndarray | None = None
    ) -> None:
        self.header, self.covariance, self._teacher = header, covariance, teacher

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        records = batch.records[self._teacher]
        composite = None
        if records.composite.size:
            composite = decode_batch(records.composite, self.header, "composite", device)
        return Targets(decode_batch(records.base, self.header, "view", device), composite)


class OnlineTargets:
    """Targets computed by the teacher from the batch's own pixels.

    They are noise-free, unless the header says that the noise of a view is pinned.
    """

    def __init__(
        self,
        teacher: FrozenBackbone,
        header: TargetHeader,
        covariance: np.ndarray | None = None,
    ) -> None:
        self.teacher, self.header, self.covariance = teacher, header, covariance

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        noise, composite = batch.photometric, None  # [B, V, 6]
        if batch.composite.size:
            composite = self._tokens(batch.composite, noise[:, 1], device)
        return Targets(self._tokens(batch.base, noise[:, 0], device), composite)

    def _tokens(self, views: np.ndarray, noise: np.ndarray, device: torch.device) -> Tokens:
        pixels = torch.from_numpy(views)
        if self.header.definition.views.get("photometric") == "pinned":
            pixels = noisy_pixels(pixels.to(device), torch.from_numpy(noise))
        # Cloned, because autograd may not save a tensor that was made in inference mode.
        return Tokens(*(t.to(device).clone() for t in self.teacher(pixels)))


class Alignment(NamedTuple):
    """What a method says about one teacher.

    Attributes:
        aligned: weighted alignment loss of every image [B]; dropping a teacher drops it.
        steering: weighted terms that steer the method's own parts; never dropped.
        terms: detached unweighted means, in the order of the task's terms after `loss`.
        diagnostics: see `Losses`.
    """

    aligned: Tensor
    steering: Tensor
    terms: Sequence[Tensor]
    diagnostics: Mapping[str, Tensor]


class AlignmentTask(Task):
    """The common part of the methods that align a student with frozen teachers.

    The losses of several teachers are averaged. Subclasses say what they look at (`look`) and how
    that compares to one teacher (`align`).

    Args:
        recipe: what is learned.
        sources: targets of every teacher; no sub-modules, so the engine neither trains nor
            shards a teacher.
    """

    def __init__(
        self, recipe: Recipe, sources: Sequence[TargetSource], *, masked: bool = False
    ) -> None:
        super().__init__(recipe, masked=masked)
        self._sources = tuple(sources)  # a tuple, so nn.Module does not look inside
        self._teacher_drop = recipe.loss.teacher_drop
        self._spaces = tuple(
            target_space(recipe.loss.targets, source.header, source.covariance)
            for source in sources
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            self.decoder = nn.ModuleList(self.head(source.header) for source in sources)

    @property
    def needs(self) -> Needs:
        """Which views this method looks at."""
        return Needs(crops=False, composite=False)

    def head(self, header: TargetHeader) -> nn.Module:
        """What stands between the student and one teacher."""
        raise NotImplementedError

    def look(self, batch: TrainBatch, moment: Moment) -> object:
        """What the student says about a batch; once for all teachers."""
        raise NotImplementedError

    def align(
        self, teacher: int, seen: object, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        """Compare what was seen to one teacher's targets, in the target space and raw."""
        raise NotImplementedError

    def forward(self, batch: TrainBatch, moment: Moment) -> Losses:
        device = self.device
        seen = self.look(batch, moment)
        results = []
        for teacher, (source, space) in enumerate(zip(self._sources, self._spaces, strict=True)):
            raw = source(batch, device)
            composite = None if raw.composite is None else space(raw.composite)
            targets = Targets(space(raw.base), composite)
            results.append(self.align(teacher, seen, targets, raw, moment))
        return self._sum(results, batch, moment)

    def _sum(self, results: Sequence[Alignment], batch: TrainBatch, moment: Moment) -> Losses:
        """Mean over teachers, after dropping."""
        aligned = torch.stack([result.aligned for result in results])  # [M, B]
        kept = self._kept(aligned.detach(), batch, moment)
        steering = torch.stack([result.steering for result in results]).mean()
        total = (kept * aligned).mean() + steering
        columns = zip(*(result.terms for result in results), strict=True)
        means = [torch.stack(values).mean() for values in columns]
        diagnostics = {
            name: torch.stack([r.diagnostics[name] for r in results]).mean(dim=0)
            for name in results[0].diagnostics
        }
        if len(results) > 1:
            diagnostics["teacher_loss"] = aligned.detach().mean(dim=1)  # [M]
        return Losses(total, torch.stack([total, *means]).detach(), diagnostics)

    def _kept(self, aligned: Tensor, batch: TrainBatch, moment: Moment) -> Tensor:
        """1 where a teacher teaches an image in this step, else 0 [M, B]; one teacher always does.

        The mean stays one over all teachers and images, dropped ones included.
        """
        if len(aligned) == 1 or not self._teacher_drop:
            return torch.ones_like(aligned)
        return kept_teachers(
            aligned,
            batch.keys,
            probability=self._teacher_drop,
            seed=self.seed,
            step=moment.step,
        )
