"""Stored targets beside those that the teacher gives for the loader's own pixels, sample by sample.

Legend: B samples of a forward, N patches, D teacher width.
"""

import gc
import time
from collections.abc import Sequence

import numpy as np
import torch

from data_tools.backgrounds import BackgroundPool
from data_tools.feature_cache import TargetCache
from data_tools.manifest import Manifest
from data_tools.order import Place
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.batch import Needs, TrainBatch
from dpal.method.build import build_task
from dpal.parity import Bounds, bounds_of, compare
from dpal.record import Kind
from dpal.target_source import CachedTargets, GivenTargets, OnlineTargets, Targets
from dpal.task import Moment, Task
from jobs.caching.plan import covariance_of, teacher_of
from jobs.comparing.figures import Figures, TeacherParity
from jobs.comparing.places import PlaceBatches


class ParityMeter:
    """Measures the caches of one recipe's teachers, one teacher at a time.

    Args:
        recipe: with one teacher.
        manifest: shards whose targets are finished.
        device: where the teacher and the student run.
    """

    def __init__(
        self,
        recipe: Recipe,
        manifest: Manifest,
        pool: BackgroundPool,
        cache: TargetCache,
        device: str,
    ) -> None:
        self.recipe, self.manifest, self.cache = recipe, manifest, cache
        self.device = torch.device(device)
        self.samples = PlaceBatches(recipe, manifest, pool, cache, self.device)
        self.given = GivenTargets(cache.header, covariance_of(recipe, cache))

    def measure(self, places: Sequence[Place]) -> TeacherParity:
        """Compare the records of `places`. Raises DataError when something cannot be read."""
        begin = time.monotonic()
        bounds = bounds_of(
            self.cache.layout("view-0").storage, getattr(self.recipe.teacher, "precision", "fp32")
        )
        rows, losses = Figures(), []
        task = self._task()
        wanted = getattr(task, "needs", Needs(crops=False, composite=False))
        online = OnlineTargets(teacher_of(self.recipe).to(self.device), self.cache.header)
        stored = CachedTargets(self.cache.header)
        for group, batch in self.samples.batches(places, wanted):
            with torch.inference_mode():
                now = online(batch, self.device)
            self._compare(rows, batch, group, now, bounds)
            losses.append(
                [self._losses(task, batch, one) for one in (stored(batch, self.device), now)]
            )
        del online, task, now  # so that training does not share memory with a teacher
        _free(self.device)
        return rows.summary(
            self.cache.store.url, len(places), losses, bounds, time.monotonic() - begin
        )

    def _task(self) -> Task:
        task = build_task(self.recipe, [self.given], RunLayout(self.recipe.run_dir).teacher)
        return task.to(self.device)

    def _compare(
        self,
        rows: Figures,
        batch: TrainBatch,
        group: Sequence[Place],
        now: Targets,
        bounds: Bounds,
    ) -> None:
        plan, (records,) = self.samples.plan, batch.records
        pairs: list[tuple[Kind, np.ndarray, object]] = [("view", records.base, now.base)]
        pairs += [("composite", records.composite, now.composite)] if now.composite else []
        for kind, stored, tokens in pairs:
            index = plan.view_index if kind == "view" else plan.composite_index
            names = [
                f"{kind}-{index(key, place.epoch)} of sample {key!r}"
                for key, place in zip(batch.keys, group, strict=True)
            ]
            rows.add(kind, names, compare(stored, tokens, self.cache.header, kind, bounds.noise))

    def _losses(self, task: Task, batch: TrainBatch, targets: Targets) -> dict[str, float]:
        spec = self.recipe.train
        moment = Moment(0, 1, self.manifest.num_samples, spec.global_batch)
        self.given.targets = targets
        with torch.no_grad():
            terms = task(batch, moment).terms
        return {name: float(term) for name, term in zip(task.terms, terms, strict=True)}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
