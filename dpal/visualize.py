"""Features and masks as pictures: arrays in, uint8 RGB out, nothing read or written.

Legend: n images, N patch tokens in row-major order, D width, h x w token grid, H x W pixels.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]  # [H, W, 3]
Floats = NDArray[np.float32]

PLATE = (21, 24, 31)  # background of a mosaic: sits well on a light and on a dark page
INK = (205, 211, 222)


class FeatureMaps(NamedTuple):
    """Colour maps of two networks for the same images.

    Attributes:
        teacher: uint8 [n, H, W, 3].
        student: uint8 [n, H, W, 3]; None without a student.
        agreement: correlation of the two colourings after alignment, 0..1; None likewise.
    """

    teacher: NDArray[np.uint8]
    student: NDArray[np.uint8] | None
    agreement: float | None


def pca_components(patches: NDArray[np.floating]) -> Floats:
    """First three principal components of patch tokens [n, N, D], as [n, N, 3].

    One basis for all images; components have mean 0 and variance 1 over all tokens. The sign
    of each makes its loading of largest magnitude positive, so the same tokens always give the
    same colours. Widths below three give zeros in the missing components.
    """
    n, num_patches, width = patches.shape
    tokens = patches.reshape(-1, width).astype(np.float64)
    tokens = tokens - tokens.mean(0)
    values, vectors = np.linalg.eigh(tokens.T @ tokens / len(tokens))  # ascending
    kept = min(3, width)
    basis = vectors[:, ::-1][:, :kept]  # [D, kept]
    strongest = basis[np.abs(basis).argmax(0), np.arange(kept)]
    basis = basis * np.where(strongest < 0, -1.0, 1.0)
    scale = np.sqrt(np.maximum(values[::-1][:kept], 0))
    projected = tokens @ basis / np.where(scale > 1e-12, scale, np.inf)
    components = np.zeros((len(tokens), 3), np.float32)
    components[:, :kept] = projected
    return components.reshape(n, num_patches, 3)


def align_components(components: Floats, reference: Floats) -> tuple[Floats, float]:
    """Rotate `components` [n, N, 3] towards `reference` so that like parts get like colours.

    The rotation (or reflection) R minimises |components R - reference|_F: orthogonal Procrustes,
    R = U V^T of the singular value decomposition of components^T reference. It changes which
    colour a direction is shown in, not what the network tells apart.

    Returns:
        The rotated components and their correlation with the reference, 0..1.
    """
    moving, fixed = components.reshape(-1, 3), reference.reshape(-1, 3)
    left, singular, right = np.linalg.svd(moving.T.astype(np.float64) @ fixed)
    rotated = (moving @ (left @ right)).astype(np.float32)
    norms = float(np.linalg.norm(moving) * np.linalg.norm(fixed))
    return rotated.reshape(components.shape), float(singular.sum() / norms) if norms else 0.0


def feature_maps(
    teacher: NDArray[np.floating],
    student: NDArray[np.floating] | None,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> FeatureMaps:
    """PCA colours of teacher and student tokens [n, N, D] on the same grid, upsampled to `size`.

    Each network has its own three-component basis; the student's colours are aligned.
    """
    reference = pca_components(teacher)
    teacher_maps = _colours(reference, grid, size)
    if student is None:
        return FeatureMaps(teacher_maps, None, None)
    aligned, agreement = align_components(pca_components(student), reference)
    return FeatureMaps(teacher_maps, _colours(aligned, grid, size), agreement)


def similarity_map(tokens: NDArray[np.floating], index: int) -> Floats:
    """Cosine similarity of token `index` to every token of `tokens` [N, D], as [N]."""
    norms = np.linalg.norm(tokens, axis=1, keepdims=True)
    unit = tokens / np.maximum(norms, 1e-12)
    return np.asarray(unit @ unit[index], np.float32)


def stretch(values: NDArray[np.floating], low: float = 1, high: float = 99) -> Floats:
    """Scale `values` to 0..1 between two percentiles taken over everything given."""
    bottom, top = np.percentile(values, (low, high))
    if top - bottom < 1e-12:
        return np.full(values.shape, 0.5, np.float32)
    return np.clip((values - bottom) / (top - bottom), 0, 1).astype(np.float32)


def heat_overlay(image: Picture, weights: NDArray[np.floating], opacity: float = 0.62) -> Picture:
    """Weights in 0..1 on a token grid [h, w], as a heat map over the greyed image."""
    height, width = image.shape[:2]
    smooth = _resize_map(np.asarray(weights, np.float32), (height, width))
    heat = _inferno()[np.rint(np.clip(smooth, 0, 1) * 255).astype(np.uint8)]  # [H, W, 3]
    grey = image.astype(np.float32).mean(2, keepdims=True)
    return np.rint(opacity * heat + (1 - opacity) * grey).astype(np.uint8)


def mark_point(image: Picture, row: float, column: float) -> Picture:
    """Draw a small ring at (row, column), in pixels."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    radius = max(3, min(image.shape[:2]) // 24)
    for grow, ink in ((1, (0, 0, 0)), (0, (255, 255, 255))):
        reach = radius + grow
        box = (column - reach, row - reach, column + reach, row + reach)
        draw.ellipse(box, outline=ink, width=2 if grow == 0 else 4)
    return np.asarray(picture)


def mosaic(
    rows: Sequence[Sequence[Picture]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell_height: int = 192,
    gap: int = 6,
) -> Picture:
    """Lay pictures out in labelled rows on one plate; each row is scaled to `cell_height`."""
    scaled = [[_to_height(picture, cell_height) for picture in row] for row in rows]
    font = ImageFont.load_default(size=max(12, cell_height // 12))
    margin = max((round(font.getlength(text)) for text in row_labels), default=0)
    margin = margin + 3 * gap if margin else gap
    top = 3 * gap + max(12, cell_height // 12) if column_labels else gap
    widths = [sum(cell.shape[1] + gap for cell in row) for row in scaled]
    canvas = Image.new(
        "RGB", (margin + max(widths, default=0), top + len(rows) * (cell_height + gap)), PLATE
    )
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(scaled):
        y, x = top + number * (cell_height + gap), margin
        if number < len(row_labels):
            draw.text((gap, y + cell_height // 2), row_labels[number], INK, font, anchor="lm")
        for column, cell in enumerate(row):
            canvas.paste(Image.fromarray(cell), (x, y))
            if number == 0 and column < len(column_labels):
                middle = (x + cell.shape[1] // 2, top // 2)
                draw.text(middle, column_labels[column], INK, font, anchor="mm")
            x += cell.shape[1] + gap
    return np.asarray(canvas)


def _colours(components: Floats, grid: tuple[int, int], size: tuple[int, int]) -> Picture:
    """Components [n, N, 3] as uint8 [n, H, W, 3], each channel stretched over all images."""
    scaled = np.stack([stretch(components[..., c]) for c in range(3)], axis=-1)
    maps = scaled.reshape(len(components), *grid, 3)
    smooth = np.stack(
        [np.stack([_resize_map(one[..., c], size) for c in range(3)], -1) for one in maps]
    )
    return np.rint(np.clip(smooth, 0, 1) * 255).astype(np.uint8)


def _resize_map(values: Floats, size: tuple[int, int]) -> Floats:
    """Bicubic resize of a float map [h, w] to `size`."""
    picture = Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _to_height(picture: Picture, height: int) -> Picture:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    if picture.shape[:2] == (height, width):
        return picture
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


@cache
def _inferno() -> NDArray[np.float32]:
    """The 256 colours of matplotlib's perceptually uniform map, [256, 3] in 0..255."""
    from matplotlib import colormaps  # slow to import, and only pictures need it

    return np.asarray(colormaps["inferno"](np.arange(256))[:, :3] * 255, np.float32)
