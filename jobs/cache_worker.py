"""One shard of images to one shard of targets; knows nothing of Ray.

Decoding and rendering of the next batch run in threads while the teacher works on this one.

Legend: B images of a batch, M samples of a shard, D teacher width.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch

from data_tools.backgrounds import load_backgrounds
from data_tools.decode import decode_rgb
from data_tools.feature_cache import (
    TargetCache,
    kind_of,
    open_cache,
    open_cache_store,
    series_of,
)
from data_tools.manifest import ShardRef, load_manifest
from data_tools.shard import Shard, read_shard
from data_tools.storage import open_store
from data_tools.target_tar import TargetTarBuilder
from dpal.base.errors import ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.calibration import fit_calibration
from dpal.model.teacher import Teacher
from dpal.record import spec_numbers
from dpal.targets import encode_batch
from dpal.views import CompositeSpec, ViewPlan, render, render_composite
from jobs.cache_plan import definition_of, is_calibrated, teacher_of

Seen = tuple[np.ndarray, np.ndarray]  # pixels of one view, its spec numbers
AHEAD = 2  # batches that are decoded ahead of the teacher


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
        self.manifest = load_manifest(self.store)
        self.pool = load_backgrounds(recipe)
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
                tokens = self.teacher(torch.from_numpy(batch["view-0"][0]))
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
            for name, (pixels, specs) in batch.items():
                tokens = self.teacher(torch.from_numpy(pixels))
                cls, patches = tokens.cls.cpu().numpy(), tokens.patches.cpu().numpy()
                try:
                    kind = kind_of(name)
                    records = encode_batch(cls, patches, specs, self.cache.header, kind)
                except DataError as error:
                    raise DataError(f"shard {ref.name!r}: {error}") from None
                tars[name].fill(start, records)
        built = {name: tar.to_bytes() for name, tar in tars.items()}
        self.cache.publish_shard(ref, shard.keys, built)
        return len(shard) * len(series)

    def _batches(
        self, shard: Shard, rows: range, series: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, Seen]]]:
        """(first row, {series: (pixels [B, H, W, 3], specs [B, S])}), always cut the same way."""
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
            image = decode_rgb(shard.image_bytes(row), self.recipe.data.max_pixels)
            source = (image.shape[0], image.shape[1])
            seen = {}
            for name in series:
                index = int(name.rpartition("-")[2])
                if kind_of(name) == "composite":
                    spec = self.plan.composite(key, index, source, self.pool.sizes)
                else:
                    spec = self.plan.base(key, index, source)
                seen[name] = (self._pixels(image, spec), spec_numbers(spec))
            return seen
        except DataError as error:
            raise DataError(f"shard {shard.ref.name!r}, sample {key!r}: {error}") from None

    def _pixels(self, image: np.ndarray, spec: object) -> np.ndarray:
        if isinstance(spec, CompositeSpec):
            return render_composite(image, self.pool.images[spec.background], spec, self.plan)
        return render(image, spec, self.plan.size)


def _stacked(start: int, futures: list[Future[dict[str, Seen]]]) -> tuple[int, dict[str, Seen]]:
    samples = [future.result() for future in futures]
    stacked = {}
    for name in samples[0]:
        pixels = np.stack([sample[name][0] for sample in samples])
        stacked[name] = (pixels, np.stack([sample[name][1] for sample in samples]))
    return start, stacked
