"""A folder of scenes and its one file of boxes, as a source: whole pictures with their boxes."""

import hashlib
import json
from collections.abc import Iterator

from data_tools.scenes import is_box_file, read_boxes
from data_tools.source import Item, Source
from data_tools.storage import SourceStore


class SceneFolder:
    """Pictures of `folder`, each with the boxes that the box file beside them gives it.

    Args:
        folder: every file below `store`.
        store: read for the box file.
    """

    def __init__(self, folder: Source, store: SourceStore) -> None:
        self.url, self._folder, self._store = folder.url, folder, store

    def items(self) -> Iterator[Item]:
        """All files but the box file, sorted by name.

        Raises:
            DataError: for several box files, or one that cannot be understood.
        """
        names = [item.name for item in self._folder.items()]
        boxes = read_boxes(self._store, names)
        for item in self._folder.items():
            if is_box_file(item.name):
                continue
            told = [list(box) for box in boxes.get(item.name, ())]
            mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
            yield item._replace(version=f"{item.version} {mark}", facts={"boxes": told})

    def read(self, picture: str) -> bytes:
        """A picture's bytes. Raises DataError when it is missing."""
        return self._folder.read(picture)
