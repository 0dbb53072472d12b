"""What is known of the persons of a picture, as it is told of a crop of that picture.

Legend: m persons, k keypoints of one.
"""

from collections.abc import Mapping
from typing import Any

BOXES = ("boxes", "visible_boxes", "head_boxes")
PLACED = (*BOXES, "keypoints", "masks")


def moved(
    facts: Mapping[str, Any], left: float, top: float, width: int, height: int
) -> dict[str, Any]:
    """The facts of a crop `width` x `height` pixels whose corner lies at (`left`, `top`).

    Boxes are cut at the crop's edges and become null where nothing is left of them. Keypoints
    and polygons move and are not cut, as what lies outside tells how the person goes on. A mask
    as RLE stays that of the whole picture and says so: `offset` is the crop's corner in it.
    """
    told = dict(facts)
    for name in BOXES:
        if name in told:
            told[name] = [_box(box, left, top, width, height) for box in told[name]]
    if "keypoints" in told:
        told["keypoints"] = [
            points and [[_round(x - left), _round(y - top), seen] for x, y, seen in points]
            for points in told["keypoints"]
        ]
    if "masks" in told:
        told["masks"] = [_mask(mask, left, top) for mask in told["masks"]]
    return told


def _box(
    box: list[float] | None, left: float, top: float, width: int, height: int
) -> list[float] | None:
    if box is None:
        return None
    x0, x1 = (min(max(x - left, 0.0), float(width)) for x in (box[0], box[2]))
    y0, y1 = (min(max(y - top, 0.0), float(height)) for y in (box[1], box[3]))
    return [_round(x) for x in (x0, y0, x1, y1)] if x0 < x1 and y0 < y1 else None


def _mask(mask: Any, left: float, top: float) -> Any:
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        before = mask.get("offset", [0, 0])
        return {**mask, "offset": [_round(before[0] + left), _round(before[1] + top)]}
    return [
        [_round(number - (top if place % 2 else left)) for place, number in enumerate(polygon)]
        for polygon in mask
    ]


def _round(number: float) -> float:
    return round(float(number), 2)
