"""What the loader hands to the task, and the protocol it does so by.

Legend: B samples on this rank, H x W base view, C local crops of h x w, S composite side,
V = 2 + C views (base, composite, crops in that order), R bytes of a target record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Records(NamedTuple):
    """What one teacher's cache says about a batch.

    Attributes:
        base: target records of the base views, uint8 [B, R].
        composite: target records of the composites, uint8 [B, R']; R' = 0 when not needed.
    """

    base: np.ndarray
    composite: np.ndarray


class Needs(NamedTuple):
    """Which views a task looks at, beside the base view; what it does not need is not rendered.

    Attributes:
        crops: local crops.
        composite: composites.
        boxes: the persons' boxes in composites of real scenes.
    """

    crops: bool
    composite: bool
    boxes: bool = False


class Boxes(NamedTuple):
    """Persons in the composites of a batch, padded to the fullest of them.

    Attributes:
        corners: left, top, right, bottom in composite pixels, float32 [B, M, 4]; padding is 0.
        counts: boxes that are no padding, int64 [B].
    """

    corners: np.ndarray
    counts: np.ndarray


class Batch(Protocol):
    """One rank's slice of a global batch; each method has its own."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Sample keys, in the order of the rows."""
        ...


@dataclass(frozen=True)
class TrainBatch:
    """Views of one image each, with the targets of every teacher, as plain arrays.

    Attributes:
        keys: sample keys, in the order of the rows.
        base: base views, uint8 [B, H, W, 3].
        crops: local crops, uint8 [B, C, h, w, 3]; C = 0 when not needed.
        composite: composites, uint8 [B, S, S, 3]; S = 0 when not needed.
        photometric: colour noise of every view, float32 [B, V, 6] (see `views.Photometric`).
        records: one entry for every teacher; empty with online targets.
        boxes: of the persons in the composites; None when not needed.
    """

    keys: tuple[str, ...]
    base: np.ndarray
    crops: np.ndarray
    composite: np.ndarray
    photometric: np.ndarray
    records: tuple[Records, ...]
    boxes: Boxes | None = None


class BatchSource(Protocol):
    """Micro-batches of a run, as a pure function of the step they belong to."""

    num_samples: int

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from `start_step` on, without end; close the iterator to stop."""
        ...
