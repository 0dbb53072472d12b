"""A folder of scenes and its one file of boxes, as a source: whole pictures with their boxes.

A folder of scenes holds images and at most one file with boxes, anywhere in it:

    boxes.csv   a table as `data_tools.sources.table` reads it, with a box in every row
    *.json      COCO instances or person keypoints, as `data_tools.sources.coco` reads them

Images are named by their path below the folder or, where only one is called so, by their last
part. An image that no row names is a scene without persons.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator

from data_tools.sources.catalogue import to_name
from data_tools.sources.coco import read_coco
from data_tools.sources.folder import FolderSource
from data_tools.sources.persons import SCENES, PersonSource, Row
from data_tools.sources.table import read_table
from data_tools.storage import SourceStore
from dpal.base.errors import DataError

NAME = "boxes.csv"
_FIRST = "SELECT picture FROM rows WHERE box IS NOT NULL ORDER BY picture LIMIT 1"
_NAMED = "SELECT 1 FROM rows JOIN pictures ON picture = asked WHERE box IS NOT NULL LIMIT 1"


class SceneFolder(PersonSource):
    """Pictures of `folder`, each with the boxes that the box file beside them gives it.

    Args:
        folder: every file below `store`.
        store: read for the box file.
    """

    def __init__(self, folder: FolderSource, store: SourceStore) -> None:
        super().__init__(store.url, store, self._rows, SCENES, keep_missing=False)
        self._catalogue = folder.catalogue

    def _rows(self, left_out: Counter[str]) -> Iterator[Row]:
        files = []
        for entry in self._listing():
            if is_box_file(entry):
                files.append(entry)
            else:
                yield Row(entry, None, {})
        if len(files) > 1:
            raise DataError(
                f"folder {self.url!r} has several files of boxes ({', '.join(map(repr, files))}): "
                f"accepted is one, {NAME} or a COCO .json"
            )
        for file in files:
            if file.endswith(NAME):
                yield from read_table(self._store, file, self.url, need_boxes=True)
            else:
                rows = read_coco(self._store, file, left_out)
                yield from (row for row in rows if row.box is not None)

    def _listing(self) -> Iterator[str]:
        assert self._catalogue is not None
        return (entry.name for entry in self._catalogue.entries())

    def _resolve(self, database: sqlite3.Connection) -> None:
        super()._resolve(database)
        first = database.execute(_FIRST).fetchone()
        if first and not database.execute(_NAMED).fetchone():
            raise DataError(
                f"the box file in {self.url!r} names none of the images beside it, first "
                f"{to_name(first[0])!r}: accepted are paths below the folder, or plain file names"
            )


def is_box_file(name: str) -> bool:
    """Whether a file of a scene folder holds boxes."""
    return name.rpartition("/")[2] == NAME or name.lower().endswith(".json")
