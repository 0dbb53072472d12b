"""Views of a shard, decoded and rendered in threads while the teacher works on the batch before.

Legend: B images of a batch, S spec numbers.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from data_tools.backgrounds import BackgroundPool
from data_tools.composites import Composer, Neighbours
from data_tools.decode import decode_rgb
from data_tools.feature_cache import kind_of
from data_tools.shard import Shard
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe
from dpal.record import spec_numbers
from dpal.views.plan import ViewPlan
from dpal.views.render import render

AHEAD = 2  # batches that are decoded ahead of the teacher


class Seen(NamedTuple):
    """One view of a sample, or of a batch with B in front.

    Attributes:
        pixels: uint8 [H, W, 3], clean.
        specs: its numbers, uint16 [S].
        noise: `views.Photometric` that the teacher sees too, float32 [6]; empty for none.
    """

    pixels: np.ndarray
    specs: np.ndarray
    noise: np.ndarray


class Renderer:
    """Renders the pinned views of a recipe; calls for several shards may run side by side.

    Args:
        threads: that decode and render, for each shard that is being read.
    """

    def __init__(self, recipe: Recipe, pool: BackgroundPool, threads: int) -> None:
        self.plan = ViewPlan(recipe.seed, recipe.views)
        self.composer = Composer(self.plan, pool)
        self.threads, self.max_pixels = threads, recipe.data.max_pixels
        self.size = recipe.teacher.batch_size

    def batches(
        self, shard: Shard, rows: Sequence[int], series: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Seen]]]:
        """(place of the first row in `rows`, {series: views of a batch}), cut the same way always.

        Raises:
            DataError: naming shard and sample that do not decode.
        """
        waiting: deque[tuple[int, list[Future[dict[str, Seen]]]]] = deque()
        with ThreadPoolExecutor(self.threads, "render") as threads:
            try:
                for start in range(0, len(rows), self.size):
                    batch = rows[start : start + self.size]
                    futures = [threads.submit(self._render, shard, row, series) for row in batch]
                    waiting.append((start, futures))
                    if len(waiting) > AHEAD:
                        yield _stacked(*waiting.popleft())
                while waiting:
                    yield _stacked(*waiting.popleft())
            finally:
                for _start, futures in waiting:
                    for future in futures:
                        future.cancel()

    def _render(self, shard: Shard, row: int, series: Sequence[str]) -> dict[str, Seen]:
        """Every asked view of one sample, decoded once."""
        key = shard.keys[row]
        try:
            image = self._decoded(shard, row)
            return {name: self._view(shard, row, image, name) for name in series}
        except DataError as error:
            raise DataError(f"shard {shard.ref.name!r}, sample {key!r}: {error}") from None

    def _view(self, shard: Shard, row: int, image: np.ndarray, series: str) -> Seen:
        key, index, plan = shard.keys[row], int(series.rpartition("-")[2]), self.plan
        pinned = plan.views.photometric == "pinned"
        if kind_of(series) == "composite":
            near = Neighbours(
                row, len(shard), lambda other: (shard.keys[other], self._decoded(shard, other))
            )
            spec, pixels = self.composer.draw(key, index, image, near)
        else:
            spec = plan.base(key, index, (image.shape[0], image.shape[1]))
            pixels = render(image, spec, plan.size)
        kind = "base" if kind_of(series) == "view" else "composite"
        noise = plan.pinned_photometric(key, kind, index) if pinned else ()
        return Seen(pixels, spec_numbers(spec), np.array(noise, dtype=np.float32))

    def _decoded(self, shard: Shard, row: int) -> np.ndarray:
        return decode_rgb(shard.image_bytes(row), self.max_pixels)


def _stacked(start: int, futures: list[Future[dict[str, Seen]]]) -> tuple[int, dict[str, Seen]]:
    samples = [future.result() for future in futures]
    return start, {
        name: Seen(*map(np.stack, zip(*(sample[name] for sample in samples), strict=True)))
        for name in samples[0]
    }
