"""Real images of several persons, with the persons' boxes: read, sharded, drawn from.

A folder of scenes holds images and at most one file with boxes, anywhere in it:

    boxes.csv   a header `file,left,top,right,bottom` and one row for every person; pixels of the
                upright image, right and bottom exclusive; `file` as the path below the folder
    *.json      COCO instances: `images`, `annotations`, `categories`; those of the category
                `person` that are no crowds; `file_name` as the path, or as the file's own name

Boxes are cut at their image's edges, and what has no area then is left out. An image that no row
names is a scene without persons. In a shard the boxes are `boxes` of the sample's JSON.

Legend: m persons of a scene.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.decode import decode_rgb
from data_tools.manifest import load_manifest
from data_tools.shard import Shard, read_shard
from data_tools.storage import SourceStore, open_store
from dpal.base.errors import DataError
from dpal.base.recipe import Recipe

RULE = "v1: scenes in the order of shards and keys, full size"
COLUMNS = ("file", "left", "top", "right", "bottom")
NAME = "boxes.csv"

Corners = tuple[float, float, float, float]


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


def read_boxes(store: SourceStore, names: Sequence[str]) -> dict[str, tuple[Corners, ...]]:
    """Boxes by file name, of the folder `store` that holds the files `names`.

    Raises:
        DataError: naming the file, when the folder has several, or one that cannot be understood.
    """
    files = [name for name in names if is_box_file(name)]
    if not files:
        return {}
    if len(files) > 1:
        raise DataError(
            f"folder {store.url!r} has several files of boxes ({', '.join(map(repr, files))}): "
            f"accepted is one, {NAME} or a COCO .json"
        )
    where = f"{store.url}/{files[0]}"
    read = _read_csv if files[0].endswith(NAME) else _read_coco
    found: dict[str, list[Corners]] = {}
    for name, corners in read(store.get(files[0]), where):
        found.setdefault(name, []).append(corners)
    full = _full_names(names)
    named = {full.get(name, name): tuple(rows) for name, rows in found.items()}
    if named and not named.keys() & set(names):
        raise DataError(
            f"{where!r} names none of the images beside it, first {min(named)!r}: accepted are "
            "paths below the folder, or plain file names"
        )
    return named


def is_box_file(name: str) -> bool:
    """Whether a file of a scene folder holds boxes."""
    return name.rpartition("/")[2] == NAME or name.lower().endswith(".json")


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


def _full_names(names: Sequence[str]) -> dict[str, str]:
    """Paths by what may stand for them: the path itself, or a file name that only one has."""
    plain = Counter(name.rpartition("/")[2] for name in names)
    short = {base: name for name in names if plain[base := name.rpartition("/")[2]] == 1}
    return short | {name: name for name in names}


def _read_csv(data: bytes, where: str) -> Iterable[tuple[str, Corners]]:
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", errors="replace"), newline=""))
    if tuple(rows.fieldnames or ()) != COLUMNS:
        raise DataError(
            f"{where!r} begins with the columns {rows.fieldnames}: accepted are {','.join(COLUMNS)}"
        )
    for row in rows:
        yield row["file"], _corners([row[name] for name in COLUMNS[1:]], f"{where}:{rows.line_num}")


def _read_coco(data: bytes, where: str) -> Iterable[tuple[str, Corners]]:
    try:
        plain = json.loads(data)
        names = {image["id"]: str(image["file_name"]) for image in plain["images"]}
        persons = {row["id"] for row in plain["categories"] if row["name"] == "person"}
        rows = [
            (names[row["image_id"]], row["bbox"])
            for row in plain["annotations"]
            if row["category_id"] in persons and not row.get("iscrowd", 0)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where!r} is no COCO instances file ({type(error).__name__} {error}): accepted is "
            "JSON with images, annotations and categories"
        ) from None
    for name, bbox in rows:
        left, top, width, height = _corners(bbox, f"{where}, image {name!r}")
        yield name, (left, top, left + width, top + height)


def _corners(numbers: Any, where: str) -> Corners:
    try:
        a, b, c, d = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise DataError(f"{where}: box {numbers} is not four numbers") from None
    if not np.isfinite([a, b, c, d]).all():
        raise DataError(f"{where}: box {numbers} is not finite")
    return a, b, c, d
