"""What the loader hands to the task, and the protocol it does so by.

Legend: B samples on this rank, H x W base view, C local crops of h x w, S composite side,
V = 2 + C views (base, composite, crops in that order), R bytes of a target record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TrainBatch:
    """One rank's slice of a global batch, as plain arrays.

    Attributes:
        keys: sample keys, in the order of the rows.
        base: base views, uint8 [B, H, W, 3].
        crops: local crops, uint8 [B, C, h, w, 3].
        composite: composites, uint8 [B, S, S, 3].
        photometric: colour noise of every view, float32 [B, V, 6] (see `views.Photometric`).
        base_records: target records of the base views, uint8 [B, R]; R = 0 with online targets.
        composite_records: target records of the composites, uint8 [B, R'].
    """

    keys: tuple[str, ...]
    base: np.ndarray
    crops: np.ndarray
    composite: np.ndarray
    photometric: np.ndarray
    base_records: np.ndarray
    composite_records: np.ndarray


class BatchSource(Protocol):
    """Micro-batches of a run, as a pure function of the step they belong to."""

    num_samples: int

    def batches(self, start_step: int) -> Iterator[TrainBatch]:
        """Micro-batches from `start_step` on, without end; close the iterator to stop."""
        ...
