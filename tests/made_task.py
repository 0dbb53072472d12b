"""A batch, targets and recipes for the tasks' tests: random numbers, no files, no teacher.

Legend: B samples, N patches, D teacher width.
"""

import math
from typing import Any

import numpy as np
import torch

from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from dpal.batch import TrainBatch
from dpal.method.dpal import DpalTask
from dpal.method.mse import MseTask
from dpal.method.proteus import ProteusTask
from dpal.method.tinymim import TinyMimTask
from dpal.model.tokens import Tokens
from dpal.target_source import Targets
from dpal.targets.header import TargetDefinition, TargetHeader
from dpal.task import Moment, Task

WIDTH = 24  # D
GRID = (8, 4)  # patches of a base view of 128 x 64
TEACHER = {"kind": "timm", "name": "vit_tiny_patch16_224", "input": [128, 64]}


def made_recipe(method: Any = "dpal", **sections: Any) -> Recipe:
    """A recipe of 128 x 64 views and student, 100 steps of 4."""
    size = {"height": 128, "width": 64}
    values: dict[str, Any] = {
        "name": "made",
        "data": {"images": ["nowhere"]},
        "views": size,
        "method": method,
        "teacher": TEACHER,
        "student": {**size, **sections.pop("student", {})},
        "train": {
            "duration": "100 steps",
            "warmup": "10 steps",
            "global_batch": 4,
            "micro_batch": 4,
            "precision": "fp32",
            **sections.pop("train", {}),
        },
    }
    return resolve_recipe({**values, **sections})


def moment(step: int = 0) -> Moment:
    """Step of a run of 100 steps over 40 samples."""
    return Moment(step, total_steps=100, num_samples=40, global_batch=4)


def made_header(width: int = WIDTH, seed: int = 0) -> TargetHeader:
    """Statistics of tokens with another mean and scale in every channel."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    return TargetHeader(
        definition=TargetDefinition({}, {}, GRID, (8, 8), "fp32", "", "", 8),
        width=width,
        patch_mean=rng.normal(size=width).astype(np.float32),
        patch_std=rng.uniform(0.5, 2, size=width).astype(np.float32),
        cls_mean=rng.normal(size=width).astype(np.float32),
        cls_std=rng.uniform(0.5, 2, size=width).astype(np.float32),
        direction=(direction / np.linalg.norm(direction)).astype(np.float32),
        low=-1.5,
        high=1.5,
        calibration_keys="",
    )


class MadeTargets:
    """Random tokens that belong to their sample keys (a `TargetSource`).

    Args:
        scale: size of the tokens.
    """

    def __init__(self, seed: int = 0, width: int = WIDTH, scale: float = 1.0) -> None:
        self.header, self.covariance = made_header(width, seed), None
        self._seed, self._scale = seed, scale

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        return Targets(self._tokens(batch, 32), self._tokens(batch, 64))

    def _tokens(self, batch: TrainBatch, patches: int) -> Tokens:
        cls, rows = [], []
        for key in batch.keys:
            rng = np.random.default_rng([self._seed, patches, int(key)])
            cls.append(self._scale * rng.normal(size=self.header.width))
            rows.append(self._scale * rng.normal(size=(patches, self.header.width)))
        return Tokens(*(torch.from_numpy(np.stack(part)).float() for part in (cls, rows)))


def made_batch(first: int = 0, size: int = 4) -> TrainBatch:
    """Samples `first`, `first` + 1, ...: random pixels that belong to their keys, no noise."""
    keys = tuple(str(number) for number in range(first, first + size))
    noise = np.zeros((size, 4, 6), dtype=np.float32)
    noise[:, :, :3] = 1  # brightness, contrast and saturation as they are

    def pixels(kind: int, *shape: int) -> np.ndarray:
        each = [np.random.default_rng([kind, int(key)]).integers(0, 256, shape) for key in keys]
        return np.stack(each).astype(np.uint8)

    return TrainBatch(
        keys=keys,
        base=pixels(0, 128, 64, 3),
        crops=pixels(1, 2, 64, 48, 3),
        composite=pixels(2, 128, 128, 3),
        photometric=noise,
        records=(),
        regions=np.stack(
            [np.random.default_rng([3, int(key)]).random((2, 4)) for key in keys]
        ).astype(np.float32),
    )


class Frozen:
    """A random norm and QKV projection of 12 heads of 4 (a `tinymim.Projection`)."""

    heads, has_cls = 12, True

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.weight = rng.normal(size=(WIDTH, 3 * 48)) / math.sqrt(WIDTH)

    def to(self, device: torch.device) -> "Frozen":
        return self

    def __call__(self, tokens: torch.Tensor) -> Any:
        joined = torch.from_numpy(tokens.double().numpy() @ self.weight).float()
        return joined.unflatten(2, (3, 12, 4)).permute(2, 0, 3, 1, 4).unbind(0)


def task_of(recipe: Recipe, *sources: MadeTargets) -> Task:
    """The task of a recipe over made targets, of one teacher unless `sources` are given."""
    sources = sources or (MadeTargets(),)
    if recipe.method.kind == "tinymim":
        return TinyMimTask(recipe, sources, [Frozen() for _ in sources])
    kinds = {"dpal": DpalTask, "mse": MseTask, "proteus": ProteusTask}
    return kinds[recipe.method.kind](recipe, sources)
