"""Human parsing by a linear probe: one linear layer from frozen patch tokens to part logits.

The logits of the patch grid are upsampled bilinearly, so a coarse grid is not punished for its
blocks but for what its tokens do not say. Training starts from zero (the problem is convex) and
is deterministic for a seed.

Legend: n images, N patches, D embedding width, C classes, H x W view pixels, h x w patch grid.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dpal.evaluate.features import Features

IGNORE = 255
TRAIN_STRIDE = 4  # the loss is taken on every fourth row and column of the mask


class ProbeSettings(NamedTuple):
    """How the linear layer is trained; the same for every backbone."""

    steps: int = 300
    batch_size: int = 64
    lr: float = 1e-2
    weight_decay: float = 1e-3
    seed: int = 0


class ParsingScores(NamedTuple):
    """Segmentation scores over the test split, in percent.

    Attributes:
        mean_iou: mean over the classes that the test masks contain, background included.
        pixel_accuracy: share of labelled pixels that are right.
        iou: intersection over union by class name; classes absent from the test masks are left out.
    """

    mean_iou: float
    pixel_accuracy: float
    iou: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """The scores by name, in percent."""
        by_class = {f"IoU {name}": value for name, value in self.iou.items()}
        return {"mIoU": self.mean_iou, "pixel accuracy": self.pixel_accuracy, **by_class}


def probe(
    train: Features,
    train_masks: np.ndarray,
    test: Features,
    test_masks: np.ndarray,
    classes: tuple[str, ...],
    settings: ProbeSettings = ProbeSettings(),  # noqa: B008  (immutable)
) -> ParsingScores:
    """Train the layer on one split and score it on the other.

    Args:
        train, test: features with patches.
        train_masks, test_masks: class indices, uint8 [n, H, W]; 255 is ignored.
        classes: names of the C classes, index 0 is the background.

    Raises:
        ValueError: features without patches, a mask with an index outside the classes, or test
            masks without one labelled pixel.
    """
    for masks in (train_masks, test_masks):
        worst = int(masks[masks != IGNORE].max(initial=0))
        if worst >= len(classes):
            raise ValueError(f"mask index {worst} has no name: there are {len(classes)} classes")
    layer = _fit(train, train_masks, len(classes), settings)
    return _scores(_confusion(layer, test, test_masks, len(classes)), classes)


class _Probe(nn.Module):
    """Standardise, classify every patch, lay out the grid, upsample."""

    mean: Tensor
    scale: Tensor

    def __init__(self, patches: Tensor, grid: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        flat = patches.flatten(0, 1)  # [n N, D]
        std, mean = torch.std_mean(flat.float(), dim=0)  # [D]
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / std.clamp(min=1e-6))
        self.grid = grid
        self.linear = nn.Linear(flat.shape[1], num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits [B, C, size[0], size[1]] of patch tokens [B, N, D]."""
        logits = self.linear((patches.float() - self.mean) * self.scale)  # [B, N, C]
        maps = logits.transpose(1, 2).unflatten(2, self.grid)  # [B, C, h, w]
        return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _fit(train: Features, masks: np.ndarray, num_classes: int, settings: ProbeSettings) -> _Probe:
    patches = _patches(train)
    half = TRAIN_STRIDE // 2
    labels = torch.from_numpy(
        np.ascontiguousarray(masks[:, half::TRAIN_STRIDE, half::TRAIN_STRIDE])
    )
    size = (labels.shape[1], labels.shape[2])
    layer = _Probe(patches, train.grid, num_classes)
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(patches), generator=generator)])
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        target = labels[chosen].long()  # [B, H / 4, W / 4]
        total = functional.cross_entropy(
            layer(patches[chosen], size), target, ignore_index=IGNORE, reduction="sum"
        )
        loss = total / (target != IGNORE).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


@torch.no_grad()
def _confusion(layer: _Probe, test: Features, masks: np.ndarray, num_classes: int) -> np.ndarray:
    """Labelled pixels by (true class, predicted class): int64 [C, C]."""
    patches = _patches(test)
    counts = np.zeros(num_classes * num_classes, np.int64)
    for start in range(0, len(patches), 32):
        truth = masks[start : start + 32].astype(np.int64)  # [B, H, W]
        size = (truth.shape[1], truth.shape[2])
        guess = layer(patches[start : start + 32], size).argmax(1).numpy()  # [B, H, W]
        labelled = truth != IGNORE
        pairs = truth[labelled] * num_classes + guess[labelled]
        counts += np.bincount(pairs, minlength=len(counts))
    return counts.reshape(num_classes, num_classes)


def _scores(confusion: np.ndarray, classes: tuple[str, ...]) -> ParsingScores:
    hits, true, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)  # [C]
    if not true.any():
        raise ValueError("the test masks have no labelled pixel")
    iou = {
        name: 100 * float(hits[c] / (true[c] + said[c] - hits[c]))
        for c, name in enumerate(classes)
        if true[c]
    }
    return ParsingScores(
        mean_iou=float(np.mean(list(iou.values()))),
        pixel_accuracy=100 * float(hits.sum() / true.sum()),
        iou=iou,
    )


def _patches(features: Features) -> Tensor:
    if features.patches is None:
        raise ValueError("the probe needs features with patches")
    return features.patches
