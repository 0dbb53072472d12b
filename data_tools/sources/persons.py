"""From rows that say who is on which picture to items: crops of persons, or whole scenes.

Tables and annotation files are read row by row into a temporary file, joined there with the
pictures that exist, and come out sorted. Memory does not grow with the rows.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from data_tools.person_facts import PLACED
from data_tools.source import Corners, Item
from data_tools.sources.catalogue import Catalogue, scratch, stat_of, to_key, to_name
from data_tools.storage import Listed, LocalStore, SourceStore
from dpal.base.errors import DataError

CROPS, SCENES = "crops", "scenes"


class Row(NamedTuple):
    """One person of a picture, or, without a box, the picture itself.

    Attributes:
        picture: its file, as the annotation names it.
        box: the person's, in pixels of the upright picture.
        facts: of this person alone: `keypoints`, `masks`, `visible_boxes`, ... without the list
            around them; anything else as it is told.
    """

    picture: str
    box: Corners | None
    facts: Mapping[str, Any]


Reader = Callable[[Counter[str]], Iterator[Row]]

_CROPS = """
SELECT CASE WHEN box IS NULL THEN found ELSE CAST(found || '#' ||
       (ROW_NUMBER() OVER (PARTITION BY found, box IS NULL ORDER BY place) - 1) AS BLOB) END
       AS name, found, size, version, box, facts
FROM rows JOIN pictures ON picture = asked ORDER BY name"""
_SCENES = """
SELECT found, found, size, version, box, facts
FROM rows JOIN pictures ON picture = asked ORDER BY found, place"""


class PersonSource:
    """Items of an annotation file or table and of the pictures that it names.

    Args:
        url: of the file, as the user named it.
        store: where the pictures lie.
        read_rows: reads the file anew; counts what it leaves out.
        persons: `crops`: an item for every person; `scenes`: one for every picture.
        whole: rows without a box are pictures to keep in crops, too.
        loose: a picture may be named by its last part alone.
        keep_missing: persons of a picture that is not there are items; else they are left out.

    Attributes:
        left_out: number of annotated persons that gave no item, by reason, once items were read.
    """

    def __init__(
        self,
        url: str,
        store: SourceStore,
        read_rows: Reader,
        persons: str,
        *,
        whole: bool = False,
        loose: bool = True,
        keep_missing: bool = True,
    ) -> None:
        self.url = url
        self.left_out: Counter[str] = Counter()
        self._store, self._read_rows = store, read_rows
        self._scenes, self._whole, self._loose = persons == SCENES, whole, loose
        self._keep_missing = keep_missing
        self._catalogue: Catalogue | None = None

    def items(self) -> Iterator[Item]:
        """All items sorted by name; a picture that is not there has size -1.

        Raises:
            DataError: when the file is damaged, names a whole picture twice, or none that exists.
        """
        with scratch(
            "CREATE TABLE rows (picture BLOB, place INTEGER PRIMARY KEY, box TEXT, facts TEXT)",
            "CREATE TABLE pictures (asked BLOB PRIMARY KEY, found BLOB, size INT, version TEXT)",
        ) as database:
            database.execute("BEGIN")
            self._pour(database)
            self._resolve(database)
            database.execute("COMMIT")
            yield from self._scene_items(database) if self._scenes else self._crop_items(database)

    def read(self, picture: str) -> bytes:
        """A picture's bytes. Raises DataError when it is missing."""
        return self._store.get(picture)

    def _pour(self, database: sqlite3.Connection) -> None:
        self.left_out.clear()
        keep_whole = self._whole or self._scenes
        database.executemany(
            "INSERT INTO rows (picture, box, facts) VALUES (?, ?, ?)",
            (
                (to_key(picture), None if box is None else json.dumps(box), json.dumps(dict(facts)))
                for picture, box, facts in self._read_rows(self.left_out)
                if self._is_kept(box, keep_whole)
            ),
        )

    def _is_kept(self, box: Corners | None, keep_whole: bool) -> bool:
        if box is None:
            return keep_whole
        if box[0] < box[2] and box[1] < box[3]:
            return True
        self.left_out["box without area"] += 1
        return False

    def _resolve(self, database: sqlite3.Connection) -> None:
        asked = database.execute("SELECT DISTINCT picture FROM rows ORDER BY picture")
        present, missing = 0, ""
        for (key,) in asked:
            name = to_name(key)
            found = self._find(name)
            present += found is not None
            missing = missing or (name if found is None else "")
            if found is None and not self._keep_missing:
                self.left_out["picture that is not there"] += 1
                continue
            entry = found or Listed(name, -1, "")
            database.execute(
                "INSERT INTO pictures VALUES (?, ?, ?, ?)", (key, to_key(entry.name), *entry[1:])
            )
        if missing and not present:
            raise DataError(
                f"{self.url!r} names none of the images in {self._store.url!r}, first "
                f"{missing!r}: accepted are paths below it, and data.pictures says where it is"
            )

    def _find(self, name: str) -> Listed | None:
        """The picture as it is listed; names that climb out of the folder raise DataError."""
        if isinstance(self._store, LocalStore):
            entry = stat_of(str(self._store.path(name)), name)
            if entry.size >= 0 or not self._loose:
                return entry if entry.size >= 0 else None
        if self._catalogue is None:
            self._catalogue = Catalogue(self._store)
        found = self._catalogue.find(name)
        return found or (self._catalogue.find_base(name) if self._loose else None)

    def _crop_items(self, database: sqlite3.Connection) -> Iterator[Item]:
        last = None
        for name, found, size, version, box, facts in database.execute(_CROPS):
            if name == last:
                raise DataError(
                    f"{self.url!r} names {to_name(name)!r} twice without boxes: accepted is one "
                    "row for a whole image, or rows with boxes"
                )
            last, corners = name, None if box is None else tuple(json.loads(box))
            told = _of_one(corners, json.loads(facts))
            yield Item(to_name(name), to_name(found), size, tagged(version, told), corners, told)

    def _scene_items(self, database: sqlite3.Connection) -> Iterator[Item]:
        for found, rows in groupby(database.execute(_SCENES), key=itemgetter(0)):
            name, size, version, persons, facts = to_name(found), -1, "", [], {}
            for _, _, size, version, box, told in rows:  # noqa: B007 - of the picture, all alike
                if box is None:
                    facts.update(json.loads(told))
                else:
                    persons.append((json.loads(box), json.loads(told)))
            facts |= _of_all(persons)
            yield Item(name, name, size, tagged(version, facts), None, facts)


def tagged(version: str, facts: Mapping[str, Any]) -> str:
    """A picture's version, with a digest of what is told of it."""
    if not facts:
        return version
    text = json.dumps(facts, sort_keys=True)
    return f"{version} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _of_one(box: Corners | None, told: dict[str, Any]) -> dict[str, Any]:
    facts = {name: [fact] if name in PLACED else fact for name, fact in told.items()}
    return facts if box is None else {"boxes": [list(box)], **facts}


def _of_all(persons: list[tuple[list[float], dict[str, Any]]]) -> dict[str, Any]:
    facts: dict[str, Any] = {"boxes": [box for box, _told in persons]}
    for name in PLACED:
        if any(name in told for _box, told in persons):
            facts[name] = [told.get(name) for _box, told in persons]
    plain = [{name: told[name] for name in told if name not in PLACED} for _box, told in persons]
    return {**facts, "persons": plain} if any(plain) else facts
