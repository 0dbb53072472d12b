"""The policy on one picture: what is kept of it and under which key, or why it is rejected.

A whole picture keeps its very bytes. Persons cut out of it, and pictures that are to be encoded
anew, are made here (`made`), a second time when their shard is written: the same picture, box and
settings give the same bytes. A key is the digest of a sample's bytes.

Legend: H, W height and width of a picture in pixels.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.decode import Pixels, decode_rgb, read_header, sniff
from data_tools.person_facts import BOXES, PLACED, moved
from data_tools.regions import decode_region
from data_tools.source import Corners, Item
from dpal.base.errors import DataError
from dpal.base.inputs import Data
from dpal.views.specs import Box

POLICY_VERSION = 1  # raise it whenever the same file would be judged otherwise
KEY_DIGITS = 32
CROP_QUALITY, CROP_SAMPLING = 95, "444"
JPEG_SAMPLING = "420"

Reason = Literal[
    "not_image",
    "unreadable",
    "undecodable",
    "undersized",
    "too_large",
    "outside",
    "duplicate",
    "near_duplicate",
]
_IMAGE_NAMES = (".jpg", ".jpeg", ".png")


class Kept(NamedTuple):
    """What is kept of one item.

    Attributes:
        key: first 32 hex digits of the SHA-256 of the sample's bytes.
        kind: `jpg` or `png`.
        size: bytes.
        height: pixels, upright.
        width: pixels, upright.
        facts: JSON of what else its sample says, in its own pixels; '' for nothing.
        look: perceptual hash, 64 bits as a signed number; 0 unless near duplicates are sought.
    """

    key: str
    kind: str
    size: int
    height: int
    width: int
    facts: str
    look: int


class Refused(NamedTuple):
    """Why an item is not kept."""

    reason: Reason
    detail: str


Verdict = Kept | Refused


class Made(NamedTuple):
    """A sample that is not its picture's own bytes; `facts` are in its pixels."""

    contents: bytes
    pixels: Pixels
    facts: dict[str, Any]


def settings(data: Data) -> str:
    """What a verdict depends on beside the item, as one line; changes when a verdict might."""
    line = f"{POLICY_VERSION} {data.min_side} {data.max_pixels} "
    made = [data.margin, data.encode, data.jpeg_quality, data.max_side, data.near_duplicates > 0]
    return line + json.dumps([*made, version("simplejpeg"), version("pillow")])


def judge(
    contents: bytes,
    items: Sequence[Item],
    data: Data,
    keep: Callable[[str, bytes], None] = lambda key, made: None,
) -> list[Verdict]:
    """Verdicts on all `items` of one picture, which is decoded once.

    Args:
        keep: gets key and bytes of every sample that is kept.
    """
    refused = _refused_whole(items[0].picture, contents, data)
    if refused is not None:
        return [refused] * len(items)
    try:
        pixels = decode_rgb(contents, data.max_pixels)  # [H, W, 3]
    except DataError as error:
        return [Refused("undecodable", str(error))] * len(items)
    return [_verdict(contents, pixels, item, data, keep) for item in items]


def sample_bytes(contents: bytes, box: Corners | None, data: Data) -> bytes:
    """The bytes of a sample from those of its picture. Raises DataError if it is not what it was.

    Args:
        box: the person; None for the whole picture.
    """
    if _is_kept_whole(box, data):
        return contents
    header = read_header(contents)
    area = _cut(box, data.margin, header.height, header.width)
    if area is None:
        raise DataError(f"box {box} lies outside its picture")
    left, top, right, bottom = area
    wanted = Box(top, left, bottom - top, right - left)
    region = decode_region(contents, wanted, data.max_pixels)
    top, left = top - region.top, left - region.left
    return _encoded(region.pixels[top:, left:][: wanted.height, : wanted.width], {}, data).contents


def made(pixels: Pixels, box: Corners | None, facts: dict[str, Any], data: Data) -> Made | None:
    """Cut, scaled and encoded as `data` asks; None when nothing of the box is in the picture."""
    area = _cut(box, data.margin, *pixels.shape[:2])
    if area is None:
        return None
    left, top, right, bottom = area
    told = moved(facts, left, top, right - left, bottom - top)
    return _encoded(pixels[top:bottom, left:right], told, data)


def _encoded(cut: Pixels, told: dict[str, Any], data: Data) -> Made:
    """A cut of a picture, scaled and encoded."""
    cut = np.ascontiguousarray(cut)  # [H, W, 3]
    quality, sampling = CROP_QUALITY, CROP_SAMPLING
    if data.encode == "jpeg":
        quality, sampling = data.jpeg_quality, JPEG_SAMPLING
        cut, told = _within(cut, told, data.max_side)
    contents = simplejpeg.encode_jpeg(
        cut, quality=quality, colorspace="RGB", colorsubsampling=sampling, fastdct=False
    )
    return Made(contents, cut, told)


def key_of(contents: bytes) -> str:
    """The key of a sample's bytes."""
    return hashlib.sha256(contents).hexdigest()[:KEY_DIGITS]


def _refused_whole(name: str, contents: bytes, data: Data) -> Refused | None:
    if sniff(contents) is None:
        if name.lower().endswith(_IMAGE_NAMES):
            return Refused("undecodable", "called an image but neither JPEG nor PNG")
        return Refused("not_image", "neither JPEG nor PNG")
    try:
        header = read_header(contents)
    except DataError as error:
        return Refused("undecodable", str(error))
    size = f"{header.width} x {header.height} pixels"
    if header.height * header.width > data.max_pixels:
        return Refused("too_large", f"{size}, data.max_pixels={data.max_pixels}")
    if min(header.height, header.width) < data.min_side:
        return Refused("undersized", f"{size}, data.min_side={data.min_side}")
    return None


def _verdict(
    contents: bytes,
    pixels: Pixels,
    item: Item,
    data: Data,
    keep: Callable[[str, bytes], None],
) -> Verdict:
    area = _cut(item.box, data.margin, *pixels.shape[:2])
    if area is None:
        return Refused("outside", f"nothing of box {list(item.box or ())} is in the picture")
    height, width = area[3] - area[1], area[2] - area[0]
    if min(height, width) < data.min_side:
        return Refused("undersized", f"{width} x {height} pixels, data.min_side={data.min_side}")
    facts = dict(item.facts)
    if _is_kept_whole(item.box, data):
        facts = moved(facts, 0, 0, width, height)
        kind, key = sniff(contents) or "jpg", key_of(contents)
    else:
        if item.box is not None and "boxes" not in facts:
            facts["boxes"] = [list(item.box)]
        one = made(pixels, item.box, facts, data)
        assert one is not None  # its area was found above
        contents, pixels, facts = one
        kind, key = "jpg", key_of(contents)
    keep(key, contents)
    told = json.dumps(_present(facts), sort_keys=True) if facts else ""
    look = _look(pixels) if data.near_duplicates else 0
    height, width = pixels.shape[:2]
    return Kept(key, kind, len(contents), height, width, told, look)


def _is_kept_whole(box: Corners | None, data: Data) -> bool:
    return box is None and data.encode == "keep"


def _cut(
    box: Corners | None, margin: float, height: int, width: int
) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom in whole pixels of what `box` and its margin have in the picture."""
    if box is None:
        return 0, 0, width, height
    aside, above = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    if not np.isfinite((*box, aside, above, box[0] - aside, box[2] + aside)).all():
        return None
    left, top = max(int(np.floor(box[0] - aside)), 0), max(int(np.floor(box[1] - above)), 0)
    right = min(int(np.ceil(box[2] + aside)), width)
    bottom = min(int(np.ceil(box[3] + above)), height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _within(pixels: Pixels, facts: dict[str, Any], side: int) -> tuple[Pixels, dict[str, Any]]:
    """Scaled down until neither side is longer than `side` pixels (0: any); facts as well."""
    height, width = pixels.shape[:2]
    if not side or max(height, width) <= side:
        return pixels, facts
    share = side / max(height, width)
    size = max(round(width * share), 1), max(round(height * share), 1)
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(smaller), _scaled(facts, size[0] / width, size[1] / height)


def _scaled(facts: dict[str, Any], across: float, down: float) -> dict[str, Any]:
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


def _present(facts: dict[str, Any]) -> dict[str, Any]:
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


def _look(pixels: Pixels) -> int:
    import imagehash  # only now: it is needed for near duplicates alone

    bits = imagehash.phash(Image.fromarray(pixels)).hash  # [8, 8]
    return int(np.packbits(bits).view(">i8")[0])
