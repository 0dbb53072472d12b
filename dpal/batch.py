"""What the loader hands to the task, and the protocol it does so by.

Legend: B samples on this rank, H x W base view, C local crops of h x w, S composite side,
V = 2 + C views (base, composite, crops in that order), R bytes of a target record.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # the loader's side needs no torch
    from torch import Tensor


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

    The pixels are tensors on the training device where they were rendered there.

    Attributes:
        keys: sample keys, in the order of the rows.
        base: base views, uint8 [B, H, W, 3].
        crops: local crops, uint8 [B, C, h, w, 3]; C = 0 when not needed.
        composite: composites, uint8 [B, S, S, 3]; S = 0 when not needed.
        photometric: colour noise of every view, float32 [B, V, 6] (see `views.Photometric`).
        records: one entry for every teacher; empty with online targets.
        boxes: of the persons in the composites; None when not needed.
        regions: where the crops lie in the base view: left, top, right, bottom as shares of its
            width and height, float32 [B, C, 4]; right < left where a crop is its mirror image.
    """

    keys: tuple[str, ...]
    base: "np.ndarray | Tensor"
    crops: "np.ndarray | Tensor"
    composite: "np.ndarray | Tensor"
    photometric: np.ndarray
    records: tuple[Records, ...]
    regions: np.ndarray
    boxes: Boxes | None = None


class Pictures(NamedTuple):
    """Images of any size, one after the other.

    Attributes:
        pixels: uint8 [P, 3]: the rows of the first image, then those of the second ...
        sizes: height and width of each image, int64 [N, 2].
    """

    pixels: np.ndarray
    sizes: np.ndarray


class Pairs(NamedTuple):
    """Composites of two persons that are still to be rendered (see `views.CompositeSpec`).

    Attributes:
        background: view numbers, of pictures of the background pool, int32 [B, 6].
        persons: view numbers of both persons, int32 [B, 2, 6].
        corners: top and left of each person in composite pixels, int32 [B, 2, 2].
    """

    background: np.ndarray
    persons: np.ndarray
    corners: np.ndarray


@dataclass(frozen=True)
class RawBatch:
    """What a `TrainBatch` is rendered from, on the training device (`dpal.device_render`).

    View numbers are: index of a picture; top, left, height and width of a box in it; flip, 0 or 1.

    Attributes:
        keys: sample keys, in the order of the rows.
        originals: decoded images of the samples, then of the partners in their composites.
        base: view numbers of the base views, int32 [B, 6].
        crops: view numbers of the local crops, int32 [B, C, 6]; C = 0 when not needed.
        pairs: composites of two persons; None when there are none.
        composite: composites that are rendered already, uint8 [B, S, S, 3]: those of scenes; S = 0
            when there are none.
        backgrounds: the pool behind the pairs: the same object in every batch of a run, so that it
            is uploaded once.
        photometric, records, regions, boxes: as in a `TrainBatch`.
    """

    keys: tuple[str, ...]
    originals: Pictures
    base: np.ndarray
    crops: np.ndarray
    pairs: Pairs | None
    composite: np.ndarray
    backgrounds: Pictures
    photometric: np.ndarray
    records: tuple[Records, ...]
    regions: np.ndarray
    boxes: Boxes | None = None


class BatchSource(Protocol):
    """Micro-batches of a run, as a pure function of the step they belong to."""

    num_samples: int

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Micro-batches from `start_step` on, without end; close the iterator to stop."""
        ...
