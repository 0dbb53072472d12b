"""Items, samples and rejects as a survey passes them on, and as rows of its database."""

import json
from typing import Any, NamedTuple

from data_tools.policy import Reason
from data_tools.source import Corners, Item


class Found(NamedTuple):
    """One item of one source, before its picture is read."""

    source: int
    item: Item


class Reject(NamedTuple):
    """One item that is not kept, and why."""

    source: str
    reason: Reason
    detail: str


class Sample(NamedTuple):
    """One kept image.

    Attributes:
        key: first 32 hex digits of the SHA-256 of its bytes.
        name: of its item, below its source.
        source: index of that source.
        picture: what that source is asked for.
        box: the person to cut out; None for the whole picture.
        kind: `jpg` or `png`.
        size: bytes.
        height: pixels, upright.
        width: pixels, upright.
        facts: JSON of what else its sample says; '' for nothing.
        spooled: where its bytes begin in `Ledger.spool`; -1: not there.
    """

    key: str
    name: str
    source: int
    picture: str
    box: Corners | None
    kind: str
    size: int
    height: int
    width: int
    facts: str
    spooled: int


def item_row(found: Found) -> tuple[Any, ...]:
    """Source, name, picture, size, version, box and facts, as they are stored."""
    item = found.item
    picture = None if item.picture == item.name else to_blob(item.picture)
    box = None if item.box is None else json.dumps(item.box)
    facts = json.dumps(item.facts) if item.facts else ""
    return found.source, to_blob(item.name), picture, item.size, item.version, box, facts


def found_of(row: tuple[Any, ...]) -> Found:
    """What `item_row` made the row of."""
    source, name, picture, size, version, box, facts = row
    text = to_text(name)
    return Found(
        source,
        Item(
            text,
            text if picture is None else to_text(picture),
            size,
            version,
            _corners(box),
            json.loads(facts) if facts else {},
        ),
    )


def sample_of(row: tuple[Any, ...]) -> Sample:
    """A sample from its fields, with name, picture and box as they are stored."""
    key, name, source, picture, box, *rest = row
    text = to_text(name)
    where = text if picture is None else to_text(picture)
    return Sample(key, text, source, where, _corners(box), *rest)


def _corners(text: str | None) -> Corners | None:
    if text is None:
        return None
    left, top, right, bottom = json.loads(text)
    return left, top, right, bottom


def to_blob(text: str) -> bytes:
    """Text as bytes that sort as it does; a file's name may be no valid Unicode."""
    return text.encode("utf-8", "surrogatepass")


def to_text(data: bytes) -> str:
    """What `to_blob` made the bytes of."""
    return data.decode("utf-8", "surrogatepass")
