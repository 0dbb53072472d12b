"""One shard of images to one shard of targets; knows nothing of Ray.

Decoding and rendering of the next batch run in threads while the teacher works on this one.

Legend: B images of a batch, S spec numbers.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from data_tools.backgrounds import load_backgrounds
from data_tools.composites import Composer, Neighbours
from data_tools.decode import decode_rgb
from data_tools.feature_cache import (
    TargetCache,
    kind_of,
    open_cache,
    open_cache_store,
    series_of,
)
from data_tools.manifest import ShardRef, manifest_of
from data_tools.shard import Shard, read_shard
from data_tools.storage import open_store
from data_tools.target_tar import TargetTarBuilder
from dpal.base.errors import ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.calibration import fit_calibration
from dpal.model.teacher import Teacher
from dpal.model.tokens import Tokens
from dpal.pixels import noisy_pixels
from dpal.record import spec_numbers
from dpal.targets import encode_batch
from dpal.views import ViewPlan, render
from jobs.cache_plan import definition_of, is_calibrated, teacher_of

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


class ShardWorker:
    """Caches shards of one recipe, one at a time.

    Args:
        threads: CPU threads of the teacher, and of decoding.
        device: where the teacher runs.
    """

    def __init__(self, recipe: Recipe, *, threads: int = 1, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"cache.gpus_per_actor={recipe.cache.gpus_per_actor}: PyTorch sees no GPU there; "
                "accepted is 0, or a machine with a GPU"
            )
        self.recipe, self.threads, self.device = recipe, threads, device
        self.plan = ViewPlan(recipe.seed, recipe.views)
        self.store = open_store(recipe.data.shards, recipe.storage)
        self.manifest = manifest_of(recipe)
        self.pool = load_backgrounds(recipe)
        self.composer = Composer(self.plan, self.pool)
        self.definition = definition_of(recipe, self.manifest, self.pool)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded at first use."""
        torch.set_num_threads(self.threads)
        teacher = teacher_of(self.recipe)
        if teacher.identity != self.definition.teacher:
            raise DataError("the teacher's weights changed while the job was starting; run again")
        return teacher.to(self.device)

    @cached_property
    def cache(self) -> TargetCache:
        """The published cache."""
        return open_cache(self.recipe, self.definition)

    def calibrate(self) -> TargetCache:
        """Publish header and covariance, fitted on base view 0 of the first images.

        Nothing happens when all that the recipe needs is there. Deterministic: the first
        `cache.calibration_images` samples in the manifest's order.
        """
        store = open_cache_store(self.recipe, self.definition)
        if is_calibrated(store, self.recipe):
            return TargetCache.open(store, self.definition)
        cls, patches, keys = [], [], []
        missing = self.recipe.cache.calibration_images
        for ref in self.manifest.shards:
            shard = read_shard(self.store, ref, None)
            rows = range(min(missing, len(shard)))
            for _start, batch in self._batches(shard, rows, ("view-0",)):
                tokens = self._tokens(batch["view-0"])
                cls.append(tokens.cls.cpu().numpy())
                patches.append(tokens.patches.cpu().numpy())
            keys += [shard.keys[row] for row in rows]
            missing -= len(rows)
            if missing <= 0:
                break
        fitted = fit_calibration(
            self.definition, np.concatenate(cls), np.concatenate(patches), keys
        )
        return TargetCache.publish(store, fitted.header, fitted.covariance)

    def cache_shard(self, ref: ShardRef) -> int:
        """Publish the targets of one shard; returns the number of images the teacher saw.

        All series of the shard are held in memory until they are published together.
        """
        shard = read_shard(self.store, ref, None)
        series = series_of(self.recipe.views)
        tars = {name: TargetTarBuilder(shard.keys, self.cache.layout(name)) for name in series}
        for start, batch in self._batches(shard, range(len(shard)), series):
            for name, seen in batch.items():
                tokens = self._tokens(seen)
                cls, patches = tokens.cls.cpu().numpy(), tokens.patches.cpu().numpy()
                try:
                    kind = kind_of(name)
                    records = encode_batch(cls, patches, seen.specs, self.cache.header, kind)
                except DataError as error:
                    raise DataError(f"shard {ref.name!r}: {error}") from None
                tars[name].fill(start, records)
        built = {name: tar.to_bytes() for name, tar in tars.items()}
        self.cache.publish_shard(ref, shard.keys, built)
        return len(shard) * len(series)

    def _tokens(self, seen: Seen) -> Tokens:
        """What the teacher says about a batch of views."""
        pixels = torch.from_numpy(seen.pixels)
        if seen.noise.size:
            pixels = noisy_pixels(pixels.to(self.device), torch.from_numpy(seen.noise))
        return self.teacher(pixels)

    def _batches(
        self, shard: Shard, rows: range, series: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Seen]]]:
        """(first row, {series: views of a batch}), always cut the same way."""
        size = self.recipe.teacher.batch_size
        waiting: deque[tuple[int, list[Future[dict[str, Seen]]]]] = deque()
        with ThreadPoolExecutor(self.threads, "render") as threads:
            try:
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
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
        return decode_rgb(shard.image_bytes(row), self.recipe.data.max_pixels)


def _stacked(start: int, futures: list[Future[dict[str, Seen]]]) -> tuple[int, dict[str, Seen]]:
    samples = [future.result() for future in futures]
    return start, {
        name: Seen(*map(np.stack, zip(*(sample[name] for sample in samples), strict=True)))
        for name in samples[0]
    }
