"""What the data pipeline asks of any way in which images lie about: items, and their bytes.

An adapter (one file each in `data_tools/sources/`) turns a folder, a table, an annotation file or
an archive into `Item`s; `data_tools.sources.open_source(url, data, storage)` chooses it. Whoever
consumes the items never learns which it was.

Facts that lie somewhere in the picture are lists with one entry for each person, in the pixels of
the upright picture, and move with a crop (`data_tools.person_facts.moved`):

    boxes, visible_boxes, head_boxes   [left, top, right, bottom], or null
    keypoints                          [[x, y, visible], ...], or null
    masks                              [[x0, y0, x1, y1, ...], ...] polygons, or COCO's RLE
                                       {"size": [height, width], "counts": ...}, or null

Any other fact (identity, camera, video, split, caption, class, ...) is of the item as a whole;
those of single persons of a scene are objects in the list `persons`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Corners = tuple[float, float, float, float]


class Item(NamedTuple):
    """One sample that a source offers, before its picture is read.

    Attributes:
        name: unique below its source; the picture's name, with `#<n>` for its n-th person.
        picture: what `Source.read` is asked for; several items may share one.
        size: of the picture, bytes; -1 for what is no regular file, or a dead link.
        version: changes when the picture's bytes or the item's facts change.
        box: keep only this person; left, top, right, bottom in pixels of the upright picture,
            right and bottom exclusive; None for the whole picture.
        facts: what the sample's JSON says about it, JSON-able: identity, camera, boxes, ...
    """

    name: str
    picture: str
    size: int
    version: str
    box: Corners | None
    facts: Mapping[str, Any]


class Source(Protocol):
    """Pictures of persons at `url`, whatever holds them."""

    url: str

    def items(self) -> Iterator[Item]:
        """All items sorted by name, in constant memory. Raises DataError for a damaged source."""
        ...

    def read(self, picture: str) -> bytes:
        """A picture's bytes; many threads may ask. Raises DataError when it is missing."""
        ...
