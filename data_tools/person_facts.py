"""What is known of the persons of a picture, as it is told of a crop of that picture.

Legend: m persons, k keypoints of one.
"""

from collections.abc import Mapping, Sequence
from sys import float_info
from typing import Any

from dpal.base.errors import DataError

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


def scaled(facts: dict[str, Any], across: float, down: float) -> dict[str, Any]:
    """The facts of a picture scaled by two factors; a mask as RLE says them: `scale`."""

    def number(value: float, place: int) -> float:
        return round(value * (down if place % 2 else across), 2)

    def numbers(values: Sequence[float]) -> list[float]:
        return [number(value, place) for place, value in enumerate(values)]

    told = dict(facts)
    for name in BOXES:
        if name in told:
            told[name] = [box and numbers(box) for box in told[name]]
    if "keypoints" in told:
        told["keypoints"] = [
            points and [[*numbers(point[:2]), *point[2:]] for point in points]
            for points in told["keypoints"]
        ]
    if "masks" in told:
        told["masks"] = [
            [numbers(polygon) for polygon in mask]
            if isinstance(mask, list)
            else mask and {**mask, "scale": [round(across, 6), round(down, 6)]}
            for mask in told["masks"]
        ]
    return told


def present(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without the persons of whom no box is in the picture."""
    boxes = facts.get("boxes")
    if not boxes or None not in boxes:
        return facts
    here = [place for place, box in enumerate(boxes) if box is not None]
    return {
        name: [value[place] for place in here]
        if name in (*PLACED, "persons") and len(value) == len(boxes)
        else value
        for name, value in facts.items()
    }


def require_placed(facts: Mapping[str, Any], where: str) -> None:
    """Raise DataError, naming the fact, when one with a place in the picture has another form."""
    for name in PLACED:
        told = facts.get(name, [])
        form = _is_box if name in BOXES else _is_keypoints if name == "keypoints" else _is_mask
        if not isinstance(told, list) or not all(one is None or form(one) for one in told):
            raise DataError(
                f"{where}: {name} {str(told)[:60]!r} cannot be understood: accepted is a list with "
                "a box, [[x, y, visible], ...], polygons or RLE for each person"
            )
    if not isinstance(facts.get("persons", []), list):
        raise DataError(f"{where}: persons is no list with what is told of each person")


def _is_box(told: Any) -> bool:
    return _are_numbers(told) and len(told) == 4


def _is_keypoints(told: Any) -> bool:
    return isinstance(told, list) and all(_are_numbers(point) and len(point) == 3 for point in told)


def _is_mask(told: Any) -> bool:
    if isinstance(told, dict):
        return _are_numbers(told.get("size")) and _are_numbers(told.get("offset", [0, 0]))
    return isinstance(told, list) and all(
        _are_numbers(polygon) and len(polygon) % 2 == 0 for polygon in told
    )


def _are_numbers(told: Any) -> bool:
    return isinstance(told, list) and all(
        type(number) in (int, float) and abs(number) <= float_info.max for number in told
    )


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
