"""Real images of several persons, with the persons' boxes, drawn from their shards.

In a shard the boxes are `boxes` of the sample's JSON: cut at the image's edges, those that have no
area then left out.

Legend: m persons of a scene.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.decode import decode_rgb
from data_tools.manifest import load_manifest
from data_tools.shard import Shard, read_shard
from data_tools.storage import open_store
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe

RULE = "v1: scenes in the order of shards and keys, full size"


@dataclass(frozen=True)
class ScenePool:
    """Scenes that composites are crops of; encoded, and decoded when one is drawn.

    Attributes:
        shards: the scenes.
        places: shard and row of every scene.
        sizes: height and width of every scene.
        boxes: left, top, right, bottom of its persons, float64 [m, 4] each.
        max_pixels: of an image that is decoded.
        digest: 16 hex digits over the scenes' keys; boxes may change, as no teacher sees them.
    """

    shards: tuple[Shard, ...]
    places: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    boxes: tuple[np.ndarray[Any, np.dtype[np.float64]], ...]
    max_pixels: int
    digest: str

    def image(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Scene `index`, uint8 [H, W, 3]."""
        shard, row = self.places[index]
        return decode_rgb(self.shards[shard].image_bytes(row), self.max_pixels)


def scenes_url(shards: str) -> str:
    """Where the shards of scenes lie, below those of the persons."""
    return f"{shards.rstrip('/')}/scenes"


def load_scenes(recipe: Recipe) -> ScenePool:
    """The recipe's scenes, the first `data.max_scenes` of them.

    Raises:
        DataError: when the shards are missing or damaged, or when instances are to be related and
            no scene has two.
    """
    store = open_store(scenes_url(recipe.data.shards), recipe.storage)
    shards: list[Shard] = []
    places: list[tuple[int, int]] = []
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    boxes: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for number, ref in enumerate(load_manifest(store).shards):
        shard = read_shard(store, ref, None)
        shards.append(shard)
        for row, key in enumerate(shard.keys[: recipe.data.max_scenes - len(keys)]):
            size, corners = _described(shard, row)
            places.append((number, row))
            keys.append(key)
            sizes.append(size)
            boxes.append(corners)
        if len(keys) >= recipe.data.max_scenes:
            break
    if recipe.loss.relation_level == "instances" and all(len(rows) < 2 for rows in boxes):
        raise DataError(
            f"no scene in {store.url!r} has boxes of two persons, which "
            "loss.relation_level=instances relates: add boxes to data.scenes and run `dpal shard`"
        )
    digest = hashlib.sha256(json.dumps([RULE, keys]).encode()).hexdigest()[:16]
    return ScenePool(
        tuple(shards), tuple(places), tuple(sizes), tuple(boxes), recipe.data.max_pixels, digest
    )


def _described(
    shard: Shard, row: int
) -> tuple[tuple[int, int], np.ndarray[Any, np.dtype[np.float64]]]:
    meta = shard.meta(row)
    try:
        corners = np.array(meta["boxes"], dtype=np.float64).reshape(-1, 4)
        return (int(meta["height"]), int(meta["width"])), corners
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"scene {shard.keys[row]!r} of shard {shard.ref.name!r} has no valid size and boxes: "
            "run `dpal shard` again"
        ) from None
