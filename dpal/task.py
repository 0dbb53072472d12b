"""The Task: what turns a batch into losses. Every method of the field has this one interface.

The methods are in `dpal/method/`, one file each; what those with frozen teachers have in common
is in `dpal/alignment.py`.

Legend: B samples, T terms.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dpal.average import MovingAverage
from dpal.base.recipe import Recipe, steps_of
from dpal.batch import Batch
from dpal.chance import generator
from dpal.model.student import build_student
from dpal.pixels import student_pixels


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
    def paths(
        self, keys: Sequence[str], moment: Moment, call: int, copies: int = 1
    ) -> Iterator[None]:
        """Within: the student drops paths as these samples' own choice in this step.

        Args:
            keys: sample keys, one for every row that goes through the student.
            call: tells forwards of the same samples in one step apart.
            copies: how often the rows of all keys follow each other, each copy with its own draws.
        """
        places = self.student.num_drop_paths
        if not places:
            yield
            return
        draws = [
            generator(self.seed, "drop-path", key, moment.step, call, copy).random(
                places, dtype=np.float32
            )
            for copy in range(copies)
            for key in keys
        ]
        with self.student.dropping(torch.from_numpy(np.stack(draws))):
            yield

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self.student.device

    def pixels(self, views: np.ndarray | Tensor, noise: np.ndarray) -> Tensor:
        """The student's input of uint8 views [B, H, W, 3] with colour noise [B, 6]."""
        return student_pixels(views, noise, self.shrink, self.device)
