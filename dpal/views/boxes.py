"""Boxes of persons and of views, carried from an image into a view of it.

Legend: m boxes of persons in an image, M of them in its view.
"""

import numpy as np

from dpal.views.specs import ViewSpec

MIN_BOX_LEFT = 0.3  # a box that lost more of its area to the crop is no instance of it
MAX_INSTANCES = 32  # the largest of a scene; bounds what the relation of a crowd costs


def boxes_in_view(boxes: np.ndarray, spec: ViewSpec, size: tuple[int, int]) -> np.ndarray:
    """Boxes of persons as they lie in a view: float32 [M, 4], the largest first.

    A box is cut at the view's edges; one that has less than 30 % of its area left is dropped, and
    so are all but the 32 largest.

    Args:
        boxes: left, top, right, bottom in source pixels, float [m, 4].
        size: height and width of the view.
    """
    top, left, height, width = spec.box
    scale = np.array([size[1] / width, size[0] / height] * 2)
    whole = (boxes - np.array([left, top] * 2)) * scale  # [m, 4] in pixels of the view
    if spec.flip:
        whole = whole[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size[1], 0, size[1], 0]
    cut = np.clip(whole, 0, [size[1], size[0]] * 2)
    left_over = _areas(cut)
    kept = np.flatnonzero((left_over > 0) & (left_over >= MIN_BOX_LEFT * _areas(whole)))
    largest = kept[np.argsort(-left_over[kept], kind="stable")][:MAX_INSTANCES]
    shown: np.ndarray = cut[largest].astype(np.float32)
    return shown


def region_in_view(inner: ViewSpec, outer: ViewSpec) -> tuple[float, float, float, float]:
    """Where view `inner` shows its pixels from in view `outer` of the same image.

    Left, top, right and bottom as shares of the outer view's width and height. Left is where the
    inner view's own left edge lies: of two views of which one is flipped, right comes before left.
    """
    top, left, height, width = outer.box
    first = (inner.box.left - left) / width
    last = first + inner.box.width / width
    if outer.flip:
        first, last = 1 - first, 1 - last
    if inner.flip:
        first, last = last, first
    upper = (inner.box.top - top) / height
    return first, upper, last, upper + inner.box.height / height


def _areas(boxes: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas
