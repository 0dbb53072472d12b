"""The pictures of `dpal preview`: what the student sees, what the teacher says, what was learned.

Legend: n images, N patches, D width, H x W base view, S composite side.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data_tools.composites import Composer, Neighbours
from dpal.augment import add_noise
from dpal.calibration import fit_header
from dpal.model.tokens import FrozenBackbone, Tokens
from dpal.record import Spec
from dpal.shape_mask import mask_of
from dpal.targets import TargetDefinition, TargetHeader
from dpal.views.plan import BLUR_PROBABILITY, ViewPlan
from dpal.views.render import render
from dpal.views.specs import CompositeSpec
from dpal.visualize import (
    PLATE,
    Picture,
    feature_maps,
    heat_overlay,
    mark_point,
    mosaic,
    similarity_map,
    stretch,
)

NUM_SIMILAR = 5


class Drawn(NamedTuple):
    """A picture and what is said under it; fields as in `Preview`."""

    kind: str
    title: str
    caption: str
    picture: Picture


@dataclass(frozen=True)
class Sample:
    """A few images of the run, decoded, with their views.

    Attributes:
        keys: sample keys.
        images: decoded images, each uint8 [H_i, W_i, 3].
        bases: base view 0, uint8 [n, H, W, 3].
        composites: composite 0, uint8 [n, S, S, 3]; n = 0 for a run without composites.
        specs: how each composite was put together.
    """

    plan: ViewPlan
    keys: tuple[str, ...]
    images: tuple[Picture, ...]
    bases: np.ndarray
    composites: np.ndarray
    specs: tuple[Spec, ...]


def make_sample(
    plan: ViewPlan,
    keys: tuple[str, ...],
    images: tuple[Picture, ...],
    composer: Composer | None,
) -> Sample:
    """Render the first base view and the first composite of every image.

    Args:
        composer: None leaves composites out. Where they are of two images, these few are the
            shard that partners come from.
    """
    bases, drawn = [], []
    for row, (key, image) in enumerate(zip(keys, images, strict=True)):
        bases.append(render(image, plan.base(key, 0, image.shape[:2]), plan.size))
        if composer is not None:
            near = Neighbours(row, len(keys), lambda other: (keys[other], images[other]))
            drawn.append(composer.draw(key, 0, image, near))
    composites = np.stack([one.pixels for one in drawn]) if drawn else np.empty((0, 0, 0, 3), "u1")
    specs = tuple(one.spec for one in drawn)
    return Sample(plan, keys, images, np.stack(bases), composites, specs)


def draw_views(sample: Sample) -> Drawn:
    """Source image, base views, local crops, and the same view under colour noise."""
    plan, height = sample.plan, sample.plan.size[0]
    sources, pinned, crops = [], [], []
    for key, image in zip(sample.keys, sample.images, strict=True):
        source = image.shape[:2]
        sources.append(_fit(image, plan.size))
        last = plan.base(key, plan.views.count - 1, source)
        pinned.append(render(image, last, plan.size))
        cuts = [render(image, cut, plan.crop_size) for cut in plan.crops(key, 0, 0, source)[:2]]
        crops.append(centred(np.concatenate(cuts), plan.size))
    rows, labels = [sources, list(sample.bases)], ["source", "base view 1"]
    if plan.views.count > 1:
        rows.append(pinned)
        labels.append(f"base view {plan.views.count}")
    rows.append(crops)
    labels.append("local crops")
    if plan.views.photometric != "off":
        rows.append(list(_noisy(sample)))
        labels.append("with noise")
    noise = {
        "free": ", and colour noise that the teacher does not see.",
        "pinned": ". Teacher and student see the same colour noise.",
        "off": ".",
    }[plan.views.photometric]
    return Drawn(
        "views",
        "Views of single persons",
        f"Each column is one image. Of single persons the teacher sees only {plan.views.count} "
        f"pinned base views ({height} × {plan.size[1]} pixels, every second one mirrored). The "
        f"student also gets fresh local crops ({plan.crop_size[0]} × {plan.crop_size[1]}), which "
        f"must predict the whole view's global feature{noise}",
        mosaic(rows, row_labels=labels),
    )


def draw_composites(sample: Sample) -> Drawn:
    """Composites of two persons, or of real scenes."""
    chosen = list(sample.composites)
    middle = (len(chosen) + 1) // 2
    kind = sample.plan.views.composite
    made = {
        "same": "A local crop and the base view of one image, blended side by side (70 % person) "
        "over a background.",
        "two": "A local crop of one image and the base view of another, blended side by side "
        "(70 % person) over a background.",
        "scenes": "Crops of real images of several persons.",
    }[kind]
    return Drawn(
        "composites",
        "Scenes of several persons" if kind == "scenes" else "Composites of two persons",
        f"{made} From these the student learns how the teacher relates the parts of a scene "
        "with several persons.",
        mosaic([row for row in (chosen[:middle], chosen[middle:]) if row]),
    )


def draw_masks(sample: Sample, teacher: Tokens, header: TargetHeader | None, kind: str) -> Drawn:
    """The shape mask that weights the local loss.

    Args:
        teacher: tokens of the base views.
        header: of the target cache; None fits the mask on these few images instead.
        kind: `loss.shape_mask`; where it is `none`, the fixed mask is drawn to look at.
    """
    grid = _grid(sample.bases, teacher)
    fitted = header or _fit_mask(teacher, grid)
    shown = "fixed" if kind == "none" else kind
    masks = mask_of(shown, teacher.patches, fitted).numpy().reshape(-1, *grid)
    overlays = [heat_overlay(v, m) for v, m in zip(sample.bases, masks, strict=True)]
    stored = header is not None and kind != "per-batch"
    origin = "stored with the target cache" if stored else "fitted on these images only"
    notes = {
        "none": " This run does not use it: loss.shape_mask is none.",
        "flipped": " Turned round, since loss.shape_mask is flipped: bright where no person is.",
        "per-batch": " Training fits it to each batch anew (loss.shape_mask is per-batch).",
    }
    return Drawn(
        "masks",
        "Shape mask",
        "How much each patch counts in the local shape loss, from 0 (dark) to 1 (bright): the "
        f"first principal component of the teacher's patch tokens, {origin}. It should be bright "
        f"on the person.{notes.get(kind, '')}",
        mosaic([list(sample.bases), overlays], row_labels=["view", "mask"]),
    )


COLOURS = (
    "The three strongest principal components of the patch features as red, green and blue; "
    "one basis for all images, so equal colours mean equal features."
)


def draw_own_features(sample: Sample, student: Tokens) -> Drawn:
    """Patch features of a student that has no teacher beside it."""
    grid = _grid(sample.bases, student)
    maps = feature_maps(student.patches.numpy(), None, grid=grid, size=sample.plan.size)
    rows = [list(sample.bases), list(maps.teacher)]
    return Drawn(
        "features", "Patch features", COLOURS, mosaic(rows, row_labels=["view", "student"])
    )


def draw_features(sample: Sample, teacher: Tokens, student: Tokens | None) -> Drawn:
    """Three principal components of patch features as colours."""
    grid = _grid(sample.bases, teacher)
    maps = feature_maps(
        teacher.patches.numpy(),
        None if student is None else student.patches.numpy(),
        grid=grid,
        size=sample.plan.size,
    )
    rows, labels = [list(sample.bases), list(maps.teacher)], ["view", "teacher"]
    caption = COLOURS
    if maps.student is not None and maps.agreement is not None:
        rows.append(list(maps.student))
        labels.append("student")
        caption += (
            " Teacher and student each have their own basis; the student's colours were rotated "
            "towards the teacher's so that like parts look alike (orthogonal Procrustes, "
            f"correlation after it {maps.agreement:.2f})."
        )
    return Drawn("features", "Patch features", caption, mosaic(rows, row_labels=labels))


def draw_similarity(sample: Sample, teacher: Tokens, student: Tokens | None) -> Drawn:
    """Which patches of a composite resemble one marked patch.

    Args:
        teacher, student: tokens of the composites.
    """
    grid = _grid(sample.composites, teacher)
    side = sample.composites.shape[1]
    marked, rows = [], {"teacher": [], "student": []}
    for index, picture in enumerate(sample.composites[:NUM_SIMILAR]):
        point = _query(sample, index, grid)
        row, column = divmod(point, grid[1])
        step = side / grid[0]
        where = ((row + 0.5) * step, (column + 0.5) * step)
        marked.append(mark_point(picture, *where))
        for name, tokens in (("teacher", teacher), ("student", student)):
            if tokens is not None:
                similar = similarity_map(tokens.patches[index].numpy(), point).reshape(grid)
                heat = heat_overlay(picture, stretch(similar))
                rows[name].append(mark_point(heat, *where))
    kept = {name: row for name, row in rows.items() if row}
    return Drawn(
        "similarity",
        "What resembles the marked point",
        "Cosine similarity of every patch of a composite to the patch under the ring, each map "
        "stretched to its own range. A backbone that knows persons lights up like parts of both "
        "figures.",
        mosaic([marked, *kept.values()], row_labels=["composite", *kept]),
    )


def tokens_of(backbone: FrozenBackbone, views: np.ndarray) -> Tokens:
    """Tokens of uint8 views [n, H, W, 3], on the CPU."""
    tokens = backbone(torch.from_numpy(np.ascontiguousarray(views)))
    return Tokens(tokens.cls.float().cpu(), tokens.patches.float().cpu())


def _fit_mask(teacher: Tokens, grid: tuple[int, int]) -> TargetHeader:
    definition = TargetDefinition({}, {}, grid, grid, "fp32", "", "", len(teacher.cls))
    return fit_header(definition, teacher.cls.numpy(), teacher.patches.numpy(), ())


def _grid(views: np.ndarray, tokens: Tokens) -> tuple[int, int]:
    """Rows and columns of the token grid of views [n, H, W, 3]."""
    height, width = views.shape[1:3]
    rows = round((tokens.patches.shape[1] * height / width) ** 0.5)
    return rows, tokens.patches.shape[1] // rows


def _query(sample: Sample, index: int, grid: tuple[int, int]) -> int:
    """Patch on the chest of the second person, who is shown whole; of a scene, the middle one."""
    spec = sample.specs[index]
    if not isinstance(spec, CompositeSpec):
        return grid[0] // 2 * grid[1] + grid[1] // 2
    top, left = spec.corners[1]
    height, width = sample.plan.crop_size
    stride = sample.composites.shape[1] // grid[0]
    row, column = int(top + 0.35 * height) // stride, (left + width // 2) // stride
    return row * grid[1] + column


def _noisy(sample: Sample) -> np.ndarray:
    plan = sample.plan
    if plan.views.photometric == "pinned":
        noise = [plan.pinned_photometric(key, "base", 0) for key in sample.keys]
    else:
        noise = [plan.photometric(key, 0, 0, BLUR_PROBABILITY["base"]) for key in sample.keys]
    planes = torch.from_numpy(sample.bases).permute(0, 3, 1, 2).float() / 255
    mixed = add_noise(planes, torch.tensor(noise, dtype=torch.float32)).clamp(0, 1)
    return (mixed * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _fit(image: Picture, size: tuple[int, int]) -> Picture:
    """The whole image inside a plate-coloured frame of `size`."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return centred(np.asarray(small), size)


def centred(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture in the middle of a plate-coloured frame of `size`."""
    frame = np.empty((*size, 3), np.uint8)
    frame[:] = PLATE
    top, left = ((a - b) // 2 for a, b in zip(size, picture.shape[:2], strict=True))
    frame[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return frame
