"""One shard of images to one shard of targets; knows nothing of Ray.

Two shards may be in work at once, in two threads. One of them has the teacher; the other is
fetched, decoded and rendered ahead, or is being written. So nothing but the teacher is waited for.

Legend: B images of a batch.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

import numpy as np
import torch

from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import (
    TargetCache,
    kind_of,
    ledger_name,
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
from dpal.targets.coding import encode_batch
from dpal.views.plan import ViewPlan
from jobs.caching.batches import Renderer, Seen
from jobs.caching.forward import HalvingForward
from jobs.caching.plan import definition_of, is_calibrated, require_width, teacher_of

LOG = logging.getLogger("dpal.cache")  # silent unless an actor opens it
UNWRITTEN = 2  # batches whose records are made while the teacher works on the next


class ShardWorker:
    """Caches shards of one recipe; `cache_shard` may be called from two threads.

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
        self.renderer = Renderer(recipe, self.pool, threads)
        self.definition = definition_of(recipe, self.manifest, self.pool)
        self._turn = Lock()  # whose holder has the teacher

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded at first use. Raises ConfigError when a setting does not fit it."""
        torch.set_num_threads(self.threads)
        teacher = teacher_of(self.recipe)
        if teacher.identity != self.definition.teacher:
            raise DataError("the teacher's weights changed while the job was starting; run again")
        require_width(self.recipe, teacher.width)
        return teacher.to(self.device)

    @cached_property
    def forward(self) -> HalvingForward:
        """The teacher on batches, or on parts of them where memory is short."""
        return HalvingForward(lambda pixels: self.teacher(pixels), self.recipe.teacher.batch_size)

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
            for _start, batch in self.renderer.batches(shard, rows, ("view-0",)):
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

        That is 0 for a shard whose targets are there, from whomever: the ledger is asked right
        before the teacher begins. All series of a shard are held in memory until they are
        published together.
        """
        if self.cache.store.exists(ledger_name(ref)):
            return 0  # nothing is fetched
        shard, series = read_shard(self.store, ref, None), series_of(self.recipe.views)
        tars = {name: TargetTarBuilder(shard.keys, self.cache.layout(name)) for name in series}
        batches = self.renderer.batches(shard, range(len(shard)), series)
        try:
            first = next(batches, None)  # by now the threads render ahead
            with self._turn:
                asked = time.time()
                if self.cache.store.exists(ledger_name(ref)):
                    return 0
                _note(asked, ref, "begun")
                if first is not None:
                    with _Records(self, ref, tars) as records:
                        records.add(*first)
                        for start, batch in batches:
                            records.add(start, batch)
        finally:
            batches.close()  # type: ignore[attr-defined]  # so that no thread renders in vain
        built = {name: tar.to_bytes() for name, tar in tars.items()}
        self.cache.publish_shard(ref, shard.keys, built)
        _note(time.time(), ref, "committed")
        return len(shard) * len(series)

    def tokens_of(
        self, shard: Shard, rows: Sequence[int], series: str
    ) -> list[tuple[int, Seen, Tokens]]:
        """What the teacher says about one series of some rows, computed as for the cache.

        Returns:
            For each batch: the place of its first row in `rows`, its views, their tokens.
        """
        return [
            (start, batch[series], self._tokens(batch[series]))
            for start, batch in self.renderer.batches(shard, rows, (series,))
        ]

    def _tokens(self, seen: Seen) -> Tokens:
        """What the teacher says about a batch of views."""
        pixels = torch.from_numpy(seen.pixels)
        if seen.noise.size:
            pixels = noisy_pixels(pixels.to(self.device), torch.from_numpy(seen.noise))
        return self.forward(pixels)


class _Records:
    """Turns tokens into records in a thread of its own, at most `UNWRITTEN` batches behind."""

    def __init__(
        self, worker: ShardWorker, ref: ShardRef, tars: dict[str, TargetTarBuilder]
    ) -> None:
        self.worker, self.ref, self.tars = worker, ref, tars
        self._thread = ThreadPoolExecutor(1, "encode")
        self._behind: deque[Future[None]] = deque()

    def __enter__(self) -> "_Records":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        try:
            while kind is None and self._behind:
                self._behind.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def add(self, start: int, batch: dict[str, Seen]) -> None:
        """Run the teacher on every series of a batch. Raises what the thread met before."""
        for name, seen in batch.items():
            tokens = self.worker._tokens(seen)
            if len(self._behind) == UNWRITTEN:
                self._behind.popleft().result()
            self._behind.append(self._thread.submit(self._fill, name, start, tokens, seen.specs))

    def _fill(self, name: str, start: int, tokens: Tokens, specs: np.ndarray) -> None:
        cls, patches = tokens.cls.cpu().numpy(), tokens.patches.cpu().numpy()
        header = self.worker.cache.header
        try:
            records = encode_batch(cls, patches, specs, header, kind_of(name))
        except DataError as error:
            raise DataError(f"shard {self.ref.name!r}: {error}") from None
        self.tars[name].fill(start, records)


def _note(at: float, ref: ShardRef, word: str) -> None:
    """A line for the actor's log: unix time, shard, and what happened to it."""
    LOG.info("%.3f shard %s %s", at, ref.name, word)
