"""CrowdHuman annotations: .odgt, one JSON object a line for one picture.

Persons are the boxes tagged `person` that nothing says to ignore; the box of a person is the full
body (`fbox`), also where it is hidden or beyond the picture; visible part (`vbox`) and head
(`hbox`) are facts. Pictures are called `<ID>.jpg`. Format: https://www.crowdhuman.org
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.source import Corners
from data_tools.sources.persons import Row
from data_tools.sources.text import corners, open_text, parse_json
from data_tools.storage import SourceStore
from dpal.base.errors import DataError

LONGEST_LINE = 2**24


def read_crowdhuman(store: SourceStore, name: str, left_out: Counter[str]) -> Iterator[Row]:
    """Every picture of the file, each followed by its persons.

    Args:
        left_out: boxes that are no person, or to be ignored, are counted here.

    Raises:
        DataError: naming file and line, for what is no such file.
    """
    url = f"{store.url}/{name}"
    with open_text(store, name) as text:
        for number, line in enumerate(_lines(text, url), 1):
            if line.strip():
                yield from _picture(line, f"{url}:{number}", left_out)


def _lines(text: Any, url: str) -> Iterator[str]:
    while True:
        try:
            line = text.readline(LONGEST_LINE)
        except UnicodeDecodeError as error:
            raise DataError(f"{url!r} is no UTF-8 .odgt: {error}") from None
        if not line:
            return
        yield line


def _picture(line: str, where: str, left_out: Counter[str]) -> Iterator[Row]:
    try:
        told = parse_json(line)
        picture, boxes = told["ID"], told["gtboxes"]
        if not isinstance(picture, str) or not picture:
            raise TypeError(f"ID {picture!r} is no text")
        picture = picture if picture.lower().endswith(".jpg") else f"{picture}.jpg"
        yield Row(picture, None, {})
        for box in boxes:
            if box["tag"] != "person":
                left_out[f"tag {box['tag']}"] += 1
            elif (box.get("extra") or {}).get("ignore", 0):
                left_out["to be ignored"] += 1
            else:
                yield _person(picture, box, where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is no picture of a CrowdHuman .odgt ({type(error).__name__} {error}): "
            "accepted is a JSON object with ID and gtboxes"
        ) from None


def _person(picture: str, box: Mapping[str, Any], where: str) -> Row:
    facts: dict[str, Any] = {}
    if "vbox" in box:
        facts["visible_boxes"] = list(_sides(box["vbox"], where))
    if "hbox" in box and not (box.get("head_attr") or {}).get("ignore", 0):
        facts["head_boxes"] = list(_sides(box["hbox"], where))
    return Row(picture, _sides(box["fbox"], where), facts)


def _sides(numbers: Any, where: str) -> Corners:
    left, top, width, height = corners(numbers, where)
    return left, top, left + width, top + height
