"""The pool of images behind composites: small, in memory, the same in every process.

Where composites are crops of real scenes, nothing is behind them, and the pool holds the scenes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_tools.decode import decode_rgb
from data_tools.manifest import Manifest, load_manifest
from data_tools.scenes import ScenePool, load_scenes
from data_tools.shard import read_shard
from data_tools.storage import ObjectStore, open_store
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe

RULE = "v1: images in the order of shards and keys, long side at most 512, bicubic"
LONG_SIDE = 512


@dataclass(frozen=True)
class BackgroundPool:
    """Images that composites are drawn over.

    Attributes:
        images: uint8 [H, W, 3] each; none beside scenes.
        digest: 16 hex digits over the images' keys and the rule that made their pixels.
        scenes: real scenes, if composites are crops of them.
    """

    images: tuple[np.ndarray[Any, np.dtype[np.uint8]], ...]
    digest: str
    scenes: ScenePool | None = None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image."""
        return [(image.shape[0], image.shape[1]) for image in self.images]


def has_own_backgrounds(recipe: Recipe) -> bool:
    """Whether the recipe shards backgrounds of their own (folders, or the drawn ones)."""
    return bool(recipe.data.backgrounds) or recipe.data.images == ("synthetic",)


def backgrounds_url(recipe: Recipe) -> str:
    """Where the shards of backgrounds lie, whether there are any or not."""
    return f"{recipe.data.shards.rstrip('/')}/backgrounds"


def load_backgrounds(recipe: Recipe) -> BackgroundPool:
    """The pool of a recipe: its background shards, or the first person shard where it has none.

    Raises:
        DataError: when the shards are missing or damaged.
    """
    if recipe.views.composite == "scenes":
        scenes = load_scenes(recipe)
        return BackgroundPool((), scenes.digest, scenes)
    own = has_own_backgrounds(recipe)
    store = open_store(backgrounds_url(recipe) if own else recipe.data.shards, recipe.storage)
    manifest = load_manifest(store)
    if not own:
        manifest = Manifest(manifest.shards[:1])
    keys: list[str] = []
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for key, data in _encoded(store, manifest, recipe.data.max_backgrounds):
        keys.append(key)
        images.append(_fit(decode_rgb(data, recipe.data.max_pixels)))
    if not images:
        raise DataError(f"no image in the shards of {store.url!r}")
    digest = hashlib.sha256(json.dumps([RULE, keys]).encode()).hexdigest()[:16]
    return BackgroundPool(tuple(images), digest)


def _encoded(store: ObjectStore, manifest: Manifest, count: int) -> Iterator[tuple[str, bytes]]:
    for ref in manifest.shards:
        shard = read_shard(store, ref, None)
        for index, key in enumerate(shard.keys[:count]):
            yield key, shard.image_bytes(index)
        count -= len(shard.keys)
        if count <= 0:
            return


def _fit(image: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    height, width = image.shape[:2]
    if max(height, width) <= LONG_SIDE:
        return image
    factor = LONG_SIDE / max(height, width)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
