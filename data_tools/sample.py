"""What the loader hands a method's renderer: one sample, and the batch it is rendered into."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from data_tools.composites import Neighbours
from data_tools.order import Place
from dpal.base.errors import DataError
from dpal.batch import Batch

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Decode = Callable[[Pixels | None], Pixels]


class SampleError(DataError):
    """One sample is damaged: it may be skipped, within `data.max_skip_fraction`.

    The message is the reason alone; whoever skips or stops names the sample.
    """


class Sample:
    """One image on its way into a batch; it is decoded when first looked at.

    Args:
        key: sample key.
        place: shard, row and epoch in the order.
        decode: its pixels, into the buffer that is given; raises SampleError.
        neighbours: the other samples of its shard; None when they are out of reach.
    """

    __slots__ = ("_decode", "_image", "key", "neighbours", "place")

    def __init__(
        self, key: str, place: Place, decode: Decode, neighbours: Neighbours | None = None
    ) -> None:
        self.key, self.place, self.neighbours = key, place, neighbours
        self._decode = decode
        self._image: Pixels | None = None

    @property
    def image(self) -> Pixels:
        """uint8 [H, W, 3]."""
        if self._image is None:
            self._image = self._decode(None)
        return self._image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]

    def decode_into(self, buffer: Pixels) -> None:
        """Decode straight into uint8 [H, W, 3] of exactly the image's size, without a copy."""
        self._decode(buffer)


class BatchBuilder(Protocol):
    """A batch that is being filled, row by row, from several threads."""

    def fill(self, row: int, sample: Sample) -> None:
        """Render every view of one sample into its row; a failed row may be filled again."""
        ...

    def finish(self) -> Batch:
        """The batch, after every row was filled."""
        ...


class SampleRenderer(Protocol):
    """What a method sees of a sample; the loader knows nothing else of it."""

    def expect(self, shard: int) -> None:
        """Told that samples of a shard will come soon; must not wait."""
        ...

    def start(self, size: int) -> BatchBuilder:
        """Begin a batch of `size` samples."""
        ...
