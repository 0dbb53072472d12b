"""Where a teacher's targets come from: a cache, or the teacher itself.

Legend: B samples, V views, D teacher width.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dpal.batch import TrainBatch
from dpal.model.tokens import FrozenBackbone, Tokens
from dpal.pixels import noisy_pixels
from dpal.targets.coding import decode_batch
from dpal.targets.header import TargetHeader


class Targets(NamedTuple):
    """What one teacher says about a batch.

    Attributes:
        base: tokens of the base views.
        composite: tokens of the composites; None when the task does not need them.
    """

    base: Tokens
    composite: Tokens | None


class TargetSource(Protocol):
    """Where one teacher's targets come from; a task cannot tell a cache from a teacher.

    Attributes:
        header: width, grid and statistics of the targets.
        covariance: of the patch tokens [D, D]; None unless the target space needs it.
    """

    header: TargetHeader
    covariance: np.ndarray | None

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets: ...


class CachedTargets:
    """Targets dequantised from the records that came with the batch.

    Args:
        teacher: index of the teacher in the recipe, and in `TrainBatch.records`.
    """

    def __init__(
        self, header: TargetHeader, teacher: int = 0, covariance: np.ndarray | None = None
    ) -> None:
        self.header, self.covariance, self._teacher = header, covariance, teacher

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        records = batch.records[self._teacher]
        composite = None
        if records.composite.size:
            composite = decode_batch(records.composite, self.header, "composite", device)
        return Targets(decode_batch(records.base, self.header, "view", device), composite)


class OnlineTargets:
    """Targets computed by the teacher from the batch's own pixels.

    They are noise-free, unless the header says that the noise of a view is pinned. The teacher runs
    in its own precision, not in that of the student's autocast: as it does when it fills a cache.
    """

    def __init__(
        self,
        teacher: FrozenBackbone,
        header: TargetHeader,
        covariance: np.ndarray | None = None,
    ) -> None:
        self.teacher, self.header, self.covariance = teacher, header, covariance

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        noise, composite = batch.photometric, None  # [B, V, 6]
        if batch.composite.shape[1]:
            composite = self._tokens(batch.composite, noise[:, 1], device)
        return Targets(self._tokens(batch.base, noise[:, 0], device), composite)

    def _tokens(
        self, views: np.ndarray | Tensor, noise: np.ndarray, device: torch.device
    ) -> Tokens:
        pixels = torch.as_tensor(views)
        if self.header.definition.views.get("photometric") == "pinned":
            pixels = noisy_pixels(pixels.to(device), torch.from_numpy(noise))
        with torch.autocast(device.type, enabled=False):
            tokens = self.teacher(pixels)
        # Cloned, because autograd may not save a tensor that was made in inference mode.
        return Tokens(*(t.to(device).clone() for t in tokens))


class GivenTargets:
    """Answers with what it was given last, so that a task can see one batch with several targets.

    Attributes:
        targets: what the next call answers.
    """

    def __init__(self, header: TargetHeader, covariance: np.ndarray | None = None) -> None:
        self.header, self.covariance = header, covariance
        self.targets: Targets | None = None

    def __call__(self, batch: TrainBatch, device: torch.device) -> Targets:
        assert self.targets is not None, "nothing was given"
        return self.targets
