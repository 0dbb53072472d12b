"""Batches of originals rendered on the training device: the pixels that a loader would render.

Legend: B samples, C local crops of h x w, H x W base view, S composite side.
"""

import numpy as np
import torch
from torch import Tensor

from dpal.batch import Pairs, Pictures, RawBatch, TrainBatch
from dpal.pass_order import pass_order
from dpal.resample import DevicePictures, PassOrder, render_boxes, upload
from dpal.views.plan import ViewPlan
from dpal.views.render import PERSON_ALPHA


class DeviceRenderer:
    """Turns a `RawBatch` into a `TrainBatch` whose pixels are on a device.

    Args:
        plan: knows the sizes of views.

    Raises:
        ConfigError: the installed Pillow resizes in a way that is not known here.
    """

    def __init__(self, plan: ViewPlan) -> None:
        self._plan = plan
        self._order: PassOrder = pass_order()
        self._pool: tuple[Pictures, DevicePictures] | None = None
        self._blended: Tensor | None = None

    @torch.no_grad()
    def __call__(self, batch: RawBatch, device: torch.device) -> TrainBatch:
        """The batch as the loader would have rendered it, pixel for pixel."""
        plan, size = self._plan, len(batch.keys)
        originals = upload(batch.originals, device)
        # What is of a crop's size is rendered at once: crops, then the persons of composites.
        numbers = [batch.crops.reshape(-1, 6)]
        if batch.pairs is not None:
            numbers.append(batch.pairs.persons.reshape(-1, 6))
        small = render_boxes(originals, np.concatenate(numbers), plan.crop_size, self._order)
        crops, persons = small.split([len(numbers[0]), len(small) - len(numbers[0])])
        composite: np.ndarray | Tensor = batch.composite
        if batch.pairs is not None:
            pool = self._backgrounds(batch.backgrounds, device)
            composite = self._composites(pool, batch.pairs, persons.unflatten(0, (size, 2)))
        return TrainBatch(
            keys=batch.keys,
            base=render_boxes(originals, batch.base, plan.size, self._order),
            crops=crops.unflatten(0, batch.crops.shape[:2]),
            composite=composite,
            photometric=batch.photometric,
            records=batch.records,
            regions=batch.regions,
            boxes=batch.boxes,
        )

    def _composites(self, pool: DevicePictures, pairs: Pairs, persons: Tensor) -> Tensor:
        """Composites, uint8 [B, S, S, 3], of persons [B, 2, h, w, 3]."""
        canvas = render_boxes(pool, pairs.background, self._plan.composite_size, self._order)
        device, blended = canvas.device, self._blend_table(canvas.device)
        height, width = self._plan.crop_size
        image = torch.arange(len(canvas), device=device).view(-1, 1, 1)
        for person in range(2):
            corners = torch.from_numpy(pairs.corners[:, person].astype(np.int64)).to(device)
            top, left = corners.view(-1, 2, 1).unbind(1)  # [B, 1]
            rows = (top + torch.arange(height, device=device)).unsqueeze(2)  # [B, h, 1]
            columns = (left + torch.arange(width, device=device)).unsqueeze(1)  # [B, 1, w]
            behind = canvas[image, rows, columns]  # [B, h, w, 3]
            canvas[image, rows, columns] = blended[persons[:, person].long(), behind.long()]
        return canvas

    def _blend_table(self, device: torch.device) -> Tensor:
        """Every mixture of a person's value (row) and a background's (column), uint8 [256, 256]."""
        if self._blended is None or self._blended.device != device:
            values = np.arange(256, dtype=np.uint8)
            mixed = PERSON_ALPHA * values[:, None] + (1 - PERSON_ALPHA) * values
            self._blended = torch.from_numpy(np.rint(mixed).astype(np.uint8)).to(device)
        return self._blended

    def _backgrounds(self, pool: Pictures, device: torch.device) -> DevicePictures:
        """The pool on the device; it is uploaded with the first batch alone."""
        if self._pool is None or self._pool[0] is not pool:
            self._pool = (pool, upload(pool, device))
        return self._pool[1]
