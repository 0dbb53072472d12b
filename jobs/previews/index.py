"""The index of a `previews/` folder: which pictures there are and what they show."""

import json
from pathlib import Path
from typing import NamedTuple

INDEX = "index.json"


class Preview(NamedTuple):
    """One picture.

    Attributes:
        file: path of the PNG.
        kind: "views", "composites", "masks", "features" or "similarity".
        title: a few words.
        caption: what is seen, in plain words.
    """

    file: Path
    kind: str
    title: str
    caption: str


class PreviewIndex(NamedTuple):
    """All pictures of a run.

    Attributes:
        digest: covers everything the pictures depend on.
        previews: in the order they are shown.
    """

    digest: str
    previews: tuple[Preview, ...]


def read_previews(folder: Path) -> PreviewIndex | None:
    """The index of `folder`; None when it is absent, damaged, or a picture is missing."""
    try:
        raw = json.loads((folder / INDEX).read_text())
        previews = tuple(
            Preview(folder / row["file"], row["kind"], row["title"], row["caption"])
            for row in raw["previews"]
        )
        index = PreviewIndex(str(raw["digest"]), previews)
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return index if all(preview.file.is_file() for preview in previews) else None


def write_index(folder: Path, index: PreviewIndex) -> None:
    """Write the index of `folder`, after all its pictures."""
    rows = [{**preview._asdict(), "file": preview.file.name} for preview in index.previews]
    text = json.dumps({"digest": index.digest, "previews": rows}, indent=2)
    (folder / INDEX).write_text(text + "\n")
