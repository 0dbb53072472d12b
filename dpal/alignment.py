"""What the methods with frozen teachers have in common.

The targets of every teacher are looked up and brought into the target space, the method compares
the student with each, and the losses are averaged after teachers were dropped.

Legend: B samples, T terms, M teachers, D teacher width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpal.base.recipe import Recipe
from dpal.batch import Needs, RawBatch, TrainBatch
from dpal.device_render import DeviceRenderer
from dpal.dropping import kept_teachers
from dpal.target_source import Targets, TargetSource
from dpal.target_space import target_space
from dpal.targets.header import TargetHeader
from dpal.task import Losses, Moment, Task
from dpal.views.plan import ViewPlan


class Alignment(NamedTuple):
    """What a method says about one teacher.

    Attributes:
        aligned: weighted alignment loss of every image [B]; dropping a teacher drops it.
        steering: weighted terms that steer the method's own parts; never dropped.
        terms: detached unweighted means, in the order of the task's terms after `loss`.
        diagnostics: see `Losses`.
    """

    aligned: Tensor
    steering: Tensor
    terms: Sequence[Tensor]
    diagnostics: Mapping[str, Tensor]


class AlignmentTask(Task):
    """The common part of the methods that align a student with frozen teachers.

    The losses of several teachers are averaged. Subclasses say what they look at (`look`) and how
    that compares to one teacher (`align`).

    Args:
        recipe: what is learned.
        sources: targets of every teacher; no sub-modules, so the engine neither trains nor
            shards a teacher.
    """

    def __init__(
        self, recipe: Recipe, sources: Sequence[TargetSource], *, masked: bool = False
    ) -> None:
        super().__init__(recipe, masked=masked)
        self._sources = tuple(sources)  # a tuple, so nn.Module does not look inside
        self._teacher_drop = recipe.loss.teacher_drop
        self._renderer: DeviceRenderer | None = None
        if recipe.train.render == "device":
            self._renderer = DeviceRenderer(ViewPlan(recipe.seed, recipe.views))
        self._spaces = tuple(
            target_space(recipe.loss.targets, source.header, source.covariance)
            for source in sources
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            self.decoder = nn.ModuleList(self.head(source.header) for source in sources)

    @property
    def needs(self) -> Needs:
        """Which views this method looks at."""
        return Needs(crops=False, composite=False)

    def head(self, header: TargetHeader) -> nn.Module:
        """What stands between the student and one teacher."""
        raise NotImplementedError

    def look(self, batch: TrainBatch, moment: Moment) -> object:
        """What the student says about a batch; once for all teachers."""
        raise NotImplementedError

    def align(
        self, teacher: int, seen: object, targets: Targets, raw: Targets, moment: Moment
    ) -> Alignment:
        """Compare what was seen to one teacher's targets, in the target space and raw."""
        raise NotImplementedError

    def forward(self, batch: TrainBatch | RawBatch, moment: Moment) -> Losses:
        device = self.device
        if isinstance(batch, RawBatch):
            assert self._renderer is not None, "train.render=loader, but batches are not rendered"
            batch = self._renderer(batch, device)
        seen = self.look(batch, moment)
        results = []
        for teacher, (source, space) in enumerate(zip(self._sources, self._spaces, strict=True)):
            raw = source(batch, device)
            composite = None if raw.composite is None else space(raw.composite)
            targets = Targets(space(raw.base), composite)
            results.append(self.align(teacher, seen, targets, raw, moment))
        return self._sum(results, batch, moment)

    def _sum(self, results: Sequence[Alignment], batch: TrainBatch, moment: Moment) -> Losses:
        """Mean over teachers, after dropping."""
        aligned = torch.stack([result.aligned for result in results])  # [M, B]
        kept = self._kept(aligned.detach(), batch, moment)
        steering = torch.stack([result.steering for result in results]).mean()
        total = (kept * aligned).mean() + steering
        columns = zip(*(result.terms for result in results), strict=True)
        means = [torch.stack(values).mean() for values in columns]
        diagnostics = {
            name: torch.stack([r.diagnostics[name] for r in results]).mean(dim=0)
            for name in results[0].diagnostics
        }
        if len(results) > 1:
            diagnostics["teacher_loss"] = aligned.detach().mean(dim=1)  # [M]
        return Losses(total, torch.stack([total, *means]).detach(), diagnostics)

    def _kept(self, aligned: Tensor, batch: TrainBatch, moment: Moment) -> Tensor:
        """1 where a teacher teaches an image in this step, else 0 [M, B]; one teacher always does.

        The mean stays one over all teachers and images, dropped ones included.
        """
        if len(aligned) == 1 or not self._teacher_drop:
            return torch.ones_like(aligned)
        return kept_teachers(
            aligned,
            batch.keys,
            probability=self._teacher_drop,
            seed=self.seed,
            step=moment.step,
        )
