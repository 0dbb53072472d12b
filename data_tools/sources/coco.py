"""COCO annotation files: instances or person keypoints, of any size.

Read element by element, in whatever order the file has its parts; what has to wait for a later
part waits on disk. Persons are the annotations of the category `person` that are no crowds.
Format: https://cocodataset.org/#format-data
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.sources.catalogue import scratch, to_key, to_name
from data_tools.sources.persons import Row
from data_tools.sources.text import corners, open_text, stream_object
from data_tools.storage import SourceStore
from dpal.base.errors import DataError

PERSON = "person"
_TOLD = ("bbox", "keypoints", "num_keypoints", "segmentation")
_PERSONS = """
SELECT file, told FROM annotations JOIN images ON image = images.id
WHERE category IN (SELECT id FROM persons) ORDER BY annotations.place"""
_ORPHAN = "SELECT image FROM annotations WHERE image NOT IN (SELECT id FROM images) LIMIT 1"


def read_coco(store: SourceStore, name: str, left_out: Counter[str]) -> Iterator[Row]:
    """Every image of the file, then every person with box, keypoints and mask.

    Args:
        left_out: crowds are counted here.

    Raises:
        DataError: naming the file, for what is no COCO annotation file.
    """
    where = f"{store.url}/{name}"
    with scratch(
        "CREATE TABLE images (id TEXT PRIMARY KEY, file BLOB)",
        "CREATE TABLE persons (id TEXT PRIMARY KEY)",
        "CREATE TABLE annotations "
        "(place INTEGER PRIMARY KEY, image TEXT, category TEXT, told TEXT)",
    ) as database:
        database.execute("BEGIN")
        try:
            with open_text(store, name) as text:
                _pour(stream_object(text), database, left_out)
        except (ValueError, KeyError, TypeError, sqlite3.IntegrityError) as error:
            raise DataError(
                f"{where!r} is no COCO instances file ({type(error).__name__} {error}): accepted "
                "is JSON with images, annotations and categories"
            ) from None
        database.execute("COMMIT")
        for (file,) in database.execute("SELECT file FROM images"):
            yield Row(to_name(file), None, {})
        for file, told in database.execute(_PERSONS):
            yield _person(to_name(file), json.loads(told), where)


def _pour(
    members: Iterator[tuple[str, Any]], database: sqlite3.Connection, left_out: Counter[str]
) -> None:
    due = {"images", "annotations", "categories"}
    for part, row in members:
        due.discard(part)
        if part == "images":
            file = to_key(_text(row["file_name"]))
            database.execute("INSERT INTO images VALUES (?, ?)", (json.dumps(row["id"]), file))
        elif part == "categories" and _text(row["name"]).lower() == PERSON:
            database.execute("INSERT INTO persons VALUES (?)", (json.dumps(row["id"]),))
        elif part == "annotations":
            image, category = json.dumps(row["image_id"]), json.dumps(row["category_id"])
            if row.get("iscrowd", 0):
                left_out["crowd"] += 1
                continue
            told = json.dumps({fact: row[fact] for fact in _TOLD if fact in row})
            database.execute(
                "INSERT INTO annotations (image, category, told) VALUES (?, ?, ?)",
                (image, category, told),
            )
    if due:
        raise KeyError(min(due))
    if not database.execute("SELECT 1 FROM persons").fetchone():
        raise ValueError(f"no category is called {PERSON!r}")
    if orphan := database.execute(_ORPHAN).fetchone():
        raise KeyError(f"image {orphan[0]}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _person(file: str, told: Mapping[str, Any], where: str) -> Row:
    place = f"{where}, image {file!r}"
    left, top, width, height = corners(told.get("bbox"), place)
    facts: dict[str, Any] = {}
    try:
        if told.get("keypoints") and told.get("num_keypoints", 1):
            facts["keypoints"] = _points(told["keypoints"])
        if told.get("segmentation"):
            facts["masks"] = _mask(told["segmentation"])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(
            f"{place}: keypoints or segmentation cannot be understood ({error}): accepted are "
            "x, y, visibility triples, and polygons or RLE"
        ) from None
    return Row(file, (left, top, left + width, top + height), facts)


def _points(numbers: Any) -> list[list[float]]:
    if len(numbers) % 3:
        raise ValueError(f"{len(numbers)} numbers are no triples")
    return [
        [float(x), float(y), int(seen)]
        for x, y, seen in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    ]


def _mask(segmentation: Any) -> Any:
    """Polygons, or an RLE as the file has it: column-major runs of the whole picture."""
    if isinstance(segmentation, dict):
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        if not isinstance(counts, str):
            counts = [int(count) for count in counts]
        return {"size": [height, width], "counts": counts}
    polygons = [[float(number) for number in polygon] for polygon in segmentation]
    if any(len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon of an odd count of numbers")
    return polygons
