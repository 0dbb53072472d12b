"""Pictures of what the teacher says and of what the student learned.

Legend: n images, N patches, D width, H x W base view, S composite side.
"""

import numpy as np
import torch

from dpal.calibration import fit_header
from dpal.model.tokens import FrozenBackbone, Tokens
from dpal.shape_mask import mask_of
from dpal.targets.header import TargetDefinition, TargetHeader
from dpal.views.specs import CompositeSpec
from dpal.visualize import feature_maps, heat_overlay, mark_point, mosaic, similarity_map, stretch
from jobs.previews.sample import Drawn, Sample

NUM_SIMILAR = 5
COLOURS = (
    "The three strongest principal components of the patch features as red, green and blue; "
    "one basis for all images, so equal colours mean equal features."
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
