"""Evaluation folders: images with labels, as `labels.csv` beside them.

    reid      labels.csv: file,pid and optionally cam, role (query, gallery or both; default both)
    parsing   labels.csv: file,mask,split (train or test); classes.json: names, index 0 background

Files are named relative to the folder and must lie in it. Masks are palette or grey PNG of class
indices; 255 is ignored.
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpal.base.errors import DataError

ROLES = ("query", "gallery", "both")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class ReidFolder:
    """A re-identification set of n images.

    Attributes:
        files: the images.
        pids: identity of each image as an index [n].
        cams: camera of each image as an index [n], or None when the set has no cameras.
        query: images that are searched for [n].
        gallery: images that are searched in [n].
    """

    files: tuple[Path, ...]
    pids: npt.NDArray[np.int64]
    cams: npt.NDArray[np.int64] | None
    query: npt.NDArray[np.bool_]
    gallery: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ParsingSplit:
    """Images and their masks, in the same order."""

    files: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class ParsingFolder:
    """A parsing set; `classes[0]` is the background."""

    classes: tuple[str, ...]
    train: ParsingSplit
    test: ParsingSplit


def read_reid(folder: Path) -> ReidFolder:
    """Read the labels of a re-identification folder. Raises DataError."""
    rows = _rows(folder, ("file", "pid"))
    roles = [row.get("role") or "both" for row in rows]
    for line, role in enumerate(roles, 2):
        if role not in ROLES:
            raise DataError(
                f"{folder / 'labels.csv'}, line {line}: role {role!r}; accepted is {_or(ROLES)}"
            )
    cams = [row.get("cam") or "" for row in rows]
    if any(cams) and not all(cams):
        line = cams.index("") + 2
        raise DataError(f"{folder / 'labels.csv'}, line {line}: cam is empty, in other lines not")
    return ReidFolder(
        files=tuple(_member(folder, row["file"], line) for line, row in enumerate(rows, 2)),
        pids=_indices([row["pid"] for row in rows]),
        cams=_indices(cams) if any(cams) else None,
        query=np.array([role != "gallery" for role in roles]),
        gallery=np.array([role != "query" for role in roles]),
    )


def read_parsing(folder: Path) -> ParsingFolder:
    """Read the labels of a parsing folder. Raises DataError."""
    rows = _rows(folder, ("file", "mask", "split"))
    splits: dict[str, list[tuple[Path, Path]]] = {name: [] for name in SPLITS}
    for line, row in enumerate(rows, 2):
        if row["split"] not in splits:
            raise DataError(
                f"{folder / 'labels.csv'}, line {line}: split {row['split']!r}; "
                f"accepted is {_or(SPLITS)}"
            )
        pair = (_member(folder, row["file"], line), _member(folder, row["mask"], line))
        splits[row["split"]].append(pair)
    for name, pairs in splits.items():
        if not pairs:
            raise DataError(f"{folder / 'labels.csv'} has no row with split {name!r}")
    train, test = (
        ParsingSplit(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))
        for pairs in (splits["train"], splits["test"])
    )
    return ParsingFolder(_classes(folder), train, test)


def labels_digest(folder: Path) -> str:
    """16 hex digits over the label files and the sizes of the files that they name."""
    digest = hashlib.sha256()
    for name in ("labels.csv", "classes.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    for row in _rows(folder, ("file",)):
        for name in (row["file"], row.get("mask") or ""):
            path = folder / name
            digest.update(f"{name}:{path.stat().st_size if path.is_file() else -1}".encode())
    return digest.hexdigest()[:16]


def _rows(folder: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    path = folder / "labels.csv"
    if not path.is_file():
        raise DataError(f"evaluation folder {str(folder)!r} has no labels.csv")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            for column in columns:
                if column not in (reader.fieldnames or ()):
                    raise DataError(
                        f"{path} has no column {column!r}; it needs {', '.join(columns)}"
                    )
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV text file ({error})") from None
    if not rows:
        raise DataError(f"{path} has no rows")
    for line, row in enumerate(rows, 2):
        for column in columns:
            if not row[column]:
                raise DataError(f"{path}, line {line}: {column} is empty")
    return rows


def _member(folder: Path, name: str, line: int) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{folder / 'labels.csv'}, line {line}: {name!r} is outside the folder")
    if not path.is_file():
        raise DataError(f"{folder / 'labels.csv'}, line {line}: file {name!r} does not exist")
    return path


def _classes(folder: Path) -> tuple[str, ...]:
    path = folder / "classes.json"
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError):
        names = None
    if (
        not isinstance(names, list)
        or not 2 <= len(names) <= 255
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != len(names)
    ):
        raise DataError(f"{path} must be a list of 2 to 255 different names")
    return tuple(names)


def _indices(words: list[str]) -> npt.NDArray[np.int64]:
    _, inverse = np.unique(np.array(words), return_inverse=True)
    return inverse.astype(np.int64)


def _or(words: tuple[str, ...]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]])
