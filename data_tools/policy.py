"""The policy on one picture: what is kept of it and under which key, or why it is rejected.

A whole picture keeps its very bytes; what else becomes of it is made by `data_tools/cutting.py`. A
key is the digest of a sample's bytes.

Legend: H, W height and width of a picture in pixels.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_tools.cutting import cut_of, is_kept_whole, made
from data_tools.decode import Pixels, decode_rgb, read_header, sniff
from data_tools.person_facts import moved, present
from data_tools.source import Item
from dpal.base.errors import DataError
from dpal.base.inputs import Data

POLICY_VERSION = 1  # raise it whenever the same file would be judged otherwise
KEY_DIGITS = 32
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
    area = cut_of(item.box, data.margin, *pixels.shape[:2])
    if area is None:
        return Refused("outside", f"nothing of box {list(item.box or ())} is in the picture")
    height, width = area[3] - area[1], area[2] - area[0]
    if min(height, width) < data.min_side:
        return Refused("undersized", f"{width} x {height} pixels, data.min_side={data.min_side}")
    facts = dict(item.facts)
    if is_kept_whole(item.box, data):
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
    told = json.dumps(present(facts), sort_keys=True) if facts else ""
    look = _look(pixels) if data.near_duplicates else 0
    height, width = pixels.shape[:2]
    return Kept(key, kind, len(contents), height, width, told, look)


def _look(pixels: Pixels) -> int:
    import imagehash  # only now: it is needed for near duplicates alone

    bits = imagehash.phash(Image.fromarray(pixels)).hash  # [8, 8]
    return int(np.packbits(bits).view(">i8")[0])
