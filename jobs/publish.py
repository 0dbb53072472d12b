"""Folders and small files that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.storage import is_alive
from dpal.base.errors import StorageError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that replaces it when the block ends without an error.

    A process killed inside the block leaves `target` as it was; killed between the two renames at
    the end it leaves no `target`, so the stage is simply run again. Leftovers of dead processes
    are removed first.

    Raises:
        StorageError: when the folder cannot be written.
    """
    aside = _aside(target, "new", os.getpid())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        aside.mkdir()
        try:
            yield aside
            _swap(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"cannot write {str(target)!r}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Put `text` where `path` is, at once; its folder is made. Raises StorageError."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def read_record(path: Path) -> dict[str, Any]:
    """What a JSON file says; one that is damaged or not there says nothing."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _swap(aside: Path, target: Path) -> None:
    old = _aside(target, "old", os.getpid())
    if target.exists():
        os.rename(target, old)
    os.rename(aside, target)
    shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.*"):
        number = leftover.name.rpartition(".")[2]
        if number.isdigit() and not (int(number) != os.getpid() and is_alive(int(number))):
            shutil.rmtree(leftover, ignore_errors=True)


def _aside(target: Path, word: str, process: int) -> Path:
    return target.with_name(f".{target.name}.{word}.{process}")
