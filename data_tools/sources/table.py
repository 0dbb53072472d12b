"""Tables of pictures: .csv, or .parquet through pyarrow.

The column `file` names the picture, as a path below the folder of pictures, or with that folder's
own path or URL before it. `left`, `top`, `right`, `bottom`, all or none, are a person's box in
pixels of the upright picture, right and bottom exclusive; a row that leaves them empty is the
whole picture. Every other column is a fact: text in a .csv, of its own type in a .parquet; `pid`
and `cam`, as label files call them, are the identity and the camera. Empty cells are no facts.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.person_facts import PLACED, require_placed
from data_tools.sources.persons import Row
from data_tools.sources.text import StoredFile, corners, open_text
from data_tools.storage import SourceStore
from dpal.base.errors import ConfigError, DataError

FILE = "file"
BOX = ("left", "top", "right", "bottom")
BATCH = 1024
_CALLED = {"pid": "identity", "cam": "camera"}
_ODD = frozenset(("", ".", ".."))


def read_table(
    store: SourceStore, name: str, root: str, *, need_boxes: bool = False
) -> Iterator[Row]:
    """Rows of the table `name`; `root` is where its pictures lie.

    Args:
        need_boxes: every row has to be a person.

    Raises:
        ConfigError: for a .parquet without pyarrow.
        DataError: naming file and row, for what is no such table.
    """
    where = f"{store.url}/{name}"
    read = _read_parquet if name.lower().endswith(".parquet") else _read_csv
    for place, cells in read(store, name, where, need_boxes):
        file = cells[FILE]
        if not isinstance(file, str) or not file:
            raise DataError(f"{place}: {FILE} is {file!r}, accepted is the path of a picture")
        numbers = [cells.get(side) for side in BOX]
        whole = not need_boxes and all(number in (None, "") for number in numbers)
        box = None if whole else corners(numbers, place)
        yield Row(below(file, root, place), box, _facts(cells, place))


def below(file: str, root: str, place: str) -> str:
    """The path of `file` below the folder or URL `root`. Raises DataError when it is not."""
    relative = file.removeprefix(root.rstrip("/") + "/")
    if "://" not in root and relative.startswith("/"):
        relative = relative.removeprefix(f"{Path(root).resolve()}/")
    parts = relative.split("/")
    if not _ODD.isdisjoint(parts):
        parts = [part for part in parts if part not in ("", ".")] if parts[0] else []
    if not parts or ".." in parts or "://" in relative:
        raise DataError(f"{place}: {FILE} {file!r} is not below {root!r}, where the pictures are")
    return "/".join(parts)


def _check_columns(names: Sequence[str], where: str, need_boxes: bool) -> None:
    sides = [side for side in BOX if side in names]
    unique = len({_CALLED.get(name, name) for name in names}) == len(names)
    told = not {"boxes", "persons"}.isdisjoint(names)  # by the rows themselves
    if FILE in names and unique and not told and len(sides) in ((4,) if need_boxes else (0, 4)):
        return
    raise DataError(
        f"{where!r} begins with the columns {list(names)}: accepted are {FILE},{','.join(BOX)}"
        + (" and others" if need_boxes else f", or {FILE}, and others")
        + ", each once, but not boxes or persons"
    )


def _facts(cells: Mapping[str, Any], place: str) -> dict[str, Any]:
    facts = {
        _CALLED.get(name, name): _fact(cell, f"{place}: {name}")
        for name, cell in cells.items()
        if name not in (FILE, *BOX) and cell not in (None, "") and cell == cell
    }
    if not facts.keys().isdisjoint(PLACED):
        require_placed({name: [facts[name]] for name in PLACED if name in facts}, place)
    return facts


def _fact(cell: Any, where: str) -> Any:
    """A cell as JSON tells it."""
    if cell is None or isinstance(cell, bool | int | str):
        return cell
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, list):
        return [_fact(one, where) for one in cell]
    if isinstance(cell, dict):
        return {str(name): _fact(one, where) for name, one in cell.items()}
    if isinstance(cell, bytes):
        raise DataError(f"{where} holds bytes, accepted are texts, numbers and lists of them")
    return str(cell)  # times and decimals


def _read_csv(
    store: SourceStore, name: str, where: str, need_boxes: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open_text(store, name) as text:
        rows = csv.DictReader(text, strict=True)
        try:
            names = list(rows.fieldnames or ())
            _check_columns(names, where, need_boxes)
            for row in rows:
                place = f"{where}:{rows.line_num}"
                if None in row:
                    raise DataError(f"{place}: {len(names)} columns are due, here are more")
                yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{where!r} is no UTF-8 .csv: {error}") from None


def _read_parquet(
    store: SourceStore, name: str, where: str, need_boxes: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{where!r}: reading .parquet needs pyarrow: `pip install 'dpal[sources]'`, or give "
            "the table as .csv"
        ) from None
    number = 0
    try:
        with StoredFile(store, name) as file, pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(names, where, need_boxes)
            for batch in table.iter_batches(batch_size=BATCH, use_threads=False):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{where}, row {number}", cells
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where!r} is no readable .parquet: {reason}") from None
