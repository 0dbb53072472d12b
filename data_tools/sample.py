"""What the loader hands a method's renderer: one sample, and the batch it is rendered into."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from data_tools.composites import Neighbours
from data_tools.order import Place
from dpal.base.errors import DataError
from dpal.batch import Batch

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Images(Protocol):
    """The samples of a shard."""

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys, in order."""
        ...

    def __len__(self) -> int: ...


# Decodes one row of a shard, into the buffer that is given; raises SampleError.
Decode = Callable[[Any, int, Pixels | None], Pixels]


class SampleError(DataError):
    """One sample is damaged: it may be skipped, within `data.max_skip_fraction`.

    The message is the reason alone; whoever skips or stops names the sample.
    """


class Sample:
    """One image on its way into a batch; it is decoded when first looked at.

    Args:
        shard: that it lies in.
        place: shard, row and epoch in the order.
        decode: gives the pixels of a row of the shard.
    """

    __slots__ = ("_decode", "_image", "_shard", "place")

    def __init__(self, shard: Images, place: Place, decode: Decode) -> None:
        self._shard, self.place, self._decode = shard, place, decode
        self._image: Pixels | None = None

    @property
    def key(self) -> str:
        """Sample key."""
        return self._shard.keys[self.place.row]

    @property
    def image(self) -> Pixels:
        """uint8 [H, W, 3]."""
        if self._image is None:
            self._image = self._decode(self._shard, self.place.row, None)
        return self._image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def neighbours(self) -> Neighbours:
        """The samples of its shard."""
        shard, decode = self._shard, self._decode

        def read(row: int) -> tuple[str, Pixels]:
            key = shard.keys[row]
            try:
                return key, decode(shard, row, None)
            except SampleError as error:
                raise SampleError(f"its partner {key!r} in a composite: {error}") from None

        return Neighbours(self.place.row, len(shard), read)

    def decode_into(self, buffer: Pixels) -> None:
        """Decode straight into uint8 [H, W, 3] of exactly the image's size, without a copy."""
        self._decode(self._shard, self.place.row, buffer)


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

    def forget(self) -> None:
        """Told that no more samples will come: what `expect` began is not needed; must not wait."""
        ...

    def start(self, size: int) -> BatchBuilder:
        """Begin a batch of `size` samples."""
        ...
