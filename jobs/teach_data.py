"""Batches for teaching: labelled persons, cropped, flipped, recoloured, partly hidden.

A batch is a pure function of (seed, step). It holds several views of each of its identities, from
all cameras, so that the metric term finds pairs.

Legend: B views, h x w view pixels.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from data_tools.synthetic import ATTRIBUTES
from dpal.base.errors import DataError
from dpal.base.inputs import Views
from dpal.model.taught import LABEL_STRIDE, Labels
from dpal.views.plan import ViewPlan
from dpal.views.render import render
from dpal.views.specs import ViewSpec

VIEWS_PER_IDENTITY = 4


class TeachBatch(NamedTuple):
    """Labelled views; pixels are float in 0..1 [B, 3, h, w]."""

    pixels: Tensor
    labels: Labels


class TeachSet:
    """The labelled persons of `synthetic/teach/`, decoded once.

    Raises:
        DataError: when the labels name a file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        table = folder / "labels.csv"
        try:
            rows = list(csv.DictReader(table.read_text().splitlines()))
            self.keys = [row["file"] for row in rows]
            pids = [int(row["pid"]) for row in rows]
            names = [attribute.name for attribute in ATTRIBUTES]
            self.attributes = [[int(row[name]) for name in names] for row in rows]
            self.masks = [_mask(folder / row["mask"]) for row in rows]
            self.images = [_image(folder / row["file"]) for row in rows]
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{table}: the labelled persons cannot be read ({error}); accepted are the columns "
                "file, pid, mask and the attributes, with files that exist"
            ) from None
        classes = sorted(set(pids))
        self.num_identities = len(classes)
        index = {pid: number for number, pid in enumerate(classes)}
        self.of_identity: list[list[int]] = [[] for _ in classes]
        self.identities = [index[pid] for pid in pids]
        for picture, identity in enumerate(self.identities):
            self.of_identity[identity].append(picture)

    def batch(self, seed: int, step: int, size: int, views: Views) -> TeachBatch:
        """The batch of `step`."""
        rng = np.random.default_rng((seed, 7919, step))
        picked = self._pick(rng, size)
        plan = ViewPlan(int(rng.integers(1 << 31)), views.model_copy(update={"scale": (0.6, 1.0)}))
        pixels, parts = [], []
        for number, picture in enumerate(picked):
            image, mask = self.images[picture], self.masks[picture]
            spec = plan.base(self.keys[picture], 2 * number, image.shape[:2])
            spec = ViewSpec(spec.box, bool(rng.random() < 0.5))
            pixels.append(render(image, spec, plan.size))
            parts.append(_render_mask(mask, spec, plan.size))
        planes = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        labels = Labels(
            identities=torch.tensor([self.identities[picture] for picture in picked]),
            attributes=torch.tensor([self.attributes[picture] for picture in picked]),
            parts=torch.from_numpy(np.stack(parts)).long(),
        )
        return TeachBatch(hide(recolour(planes, generator), generator), labels)

    def _pick(self, rng: np.random.Generator, size: int) -> list[int]:
        """`size` pictures, VIEWS_PER_IDENTITY of each identity drawn."""
        count = min(-(-size // VIEWS_PER_IDENTITY), self.num_identities)
        chosen = rng.choice(self.num_identities, count, replace=False)
        picked: list[int] = []
        for slot in range(size):
            pictures = self.of_identity[chosen[slot % count]]
            picked.append(pictures[int(rng.integers(len(pictures)))])
        return picked


def recolour(planes: Tensor, generator: torch.Generator) -> Tensor:
    """Strong colour noise on [B, 3, h, w] in 0..1, so that the camera's cast says nothing."""
    batch = len(planes)

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(batch, channels, 1, 1, generator=generator) * (high - low) + low

    saturation, exposure = draw(0.6, 1.3), draw(-0.35, 0.35).exp()
    gain, lift, gamma = draw(-0.12, 0.12, 3).exp(), draw(-0.04, 0.05, 3), draw(-0.2, 0.2).exp()
    grey = planes.mean(1, keepdim=True)
    light = grey + (planes - grey) * saturation
    light = (light * exposure * gain + lift).clamp(0, 1)
    return light**gamma


def hide(planes: Tensor, generator: torch.Generator) -> Tensor:
    """Cover one random rectangle of half of the views with a flat colour (random erasing)."""
    batch, _, height, width = planes.shape
    drawn = torch.rand(batch, 5, 1, 1, generator=generator)  # [B, 5, 1, 1]
    tall, wide = height * (0.1 + 0.3 * drawn[:, 0]), width * (0.15 + 0.5 * drawn[:, 1])
    top, left = (height - tall) * drawn[:, 2], (width - wide) * drawn[:, 3]
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)  # [B, h, w]
    inside &= drawn[:, 4] < 0.5
    colour = torch.rand(batch, 3, 1, 1, generator=generator)
    return torch.where(inside[:, None], colour, planes)


def _render_mask(mask: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
    """Part under the centre of every label cell: uint8 [h / 4, w / 4]."""
    top, left, height, width = spec.box
    rows, columns = size[0] // LABEL_STRIDE, size[1] // LABEL_STRIDE
    y = (top + (np.arange(rows) + 0.5) * height / rows).astype(int)
    x = (left + (np.arange(columns) + 0.5) * width / columns).astype(int)
    parts = mask[np.ix_(y, x)]
    return np.ascontiguousarray(parts[:, ::-1] if spec.flip else parts)


def _image(path: Path) -> np.ndarray:
    pixels: np.ndarray = simplejpeg.decode_jpeg(path.read_bytes())
    return pixels


def _mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
