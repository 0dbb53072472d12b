"""Write the embedded data set: persons and backgrounds, labels for the teacher and for evaluation.

    persons/<number>.jpg  backgrounds/<number>.jpg     unlabelled pictures that are sharded
    teach/labels.csv  teach/masks/                     labels of the same persons: file, pid, cam,
                                                       mask, and one column for each attribute
    reid/labels.csv  parsing/labels.csv classes.json   held-out identities only

Every file is a pure function of its name, the sizes and the seed, and is published by one rename,
so a killed run goes on where it stopped and two runs at once end with the same bytes.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.synthetic.appearance import DRAWING_VERSION, appearance
from data_tools.synthetic.attributes import ATTRIBUTES, attributes_of
from data_tools.synthetic.camera import NUM_CAMERAS
from data_tools.synthetic.canvas import PARTS
from data_tools.synthetic.scene import Person, draw_background, draw_person
from dpal.base.errors import StorageError
from dpal.base.inputs import Synthetic
from dpal.base.progress import Progress

JPEG_QUALITY = 90
NUM_BACKGROUNDS = 96
REID_IMAGES = 8
PARSING_IMAGES = 8
RULE, MARKER = "rule.json", "COMPLETE"
_ASIDE = ".aside"
_PALETTE = bytes.fromhex("000000643c28e6b48c2864c8e68c64285a50d2aa82c8283c966e28")


class _Item(NamedTuple):
    """One file to be written; `paths` may hold an image and its mask, drawn together."""

    paths: tuple[str, ...]
    draw: Callable[[], tuple[bytes, ...]]


def write_dataset(folder: Path, size: Synthetic, seed: int) -> None:
    """Draw whatever is missing in `folder`; a folder of another size or seed is drawn anew.

    Raises:
        StorageError: when the folder cannot be written.
    """
    rule = json.dumps(dataset_rule(size, seed), sort_keys=True)
    marker = folder / MARKER
    try:
        if marker.is_file() and marker.read_text() == rule:
            return
        current = folder / RULE
        if folder.exists() and not (current.is_file() and current.read_text() == rule):
            marker.unlink(missing_ok=True)
            shutil.rmtree(folder)
        (folder / _ASIDE).mkdir(parents=True, exist_ok=True)
        _publish(folder, RULE, rule.encode())
        items = list(_items(size, seed))
        missing = [item for item in items if not all((folder / p).is_file() for p in item.paths)]
        with Progress("draw persons", len(items), "file", initial=len(items) - len(missing)) as bar:
            for item in missing:
                for path, data in zip(item.paths, item.draw(), strict=True):
                    _publish(folder, path, data)
                bar.advance()
        _publish(folder, MARKER, rule.encode())
    except OSError as error:
        raise StorageError(
            f"synthetic data folder {str(folder)!r} cannot be written: {error.strerror}"
        ) from None


def dataset_rule(size: Synthetic, seed: int) -> dict[str, object]:
    """Everything that decides the bytes of the data set."""
    return {"drawing": DRAWING_VERSION, "seed": seed, **size.model_dump(mode="json")}


def _items(size: Synthetic, seed: int) -> Iterator[_Item]:
    teach: list[tuple[object, ...]] = []
    for number, (identity, index) in enumerate(_shuffled(size, seed)):
        person, mask = f"persons/{number:06d}.jpg", f"masks/{number:06d}.png"
        said = attributes_of(appearance(seed, identity))
        teach.append((f"../{person}", identity, index % NUM_CAMERAS, mask, *said))
        yield _Item((person, f"teach/{mask}"), partial(_person_files, seed, identity, index))
    columns = ("file", "pid", "cam", "mask", *(attribute.name for attribute in ATTRIBUTES))
    yield _table("teach/labels.csv", columns, teach)
    yield from _classes("teach")
    for number in range(NUM_BACKGROUNDS):
        yield _Item((f"backgrounds/{number:06d}.jpg",), partial(_background_file, seed, number))
    yield from _held_out(size, seed)


def _held_out(size: Synthetic, seed: int) -> Iterator[_Item]:
    reid: list[tuple[object, ...]] = []
    parsing: list[tuple[object, ...]] = []
    first, count = size.identities, size.held_out_identities
    for identity in range(first, first + count):
        for index in range(REID_IMAGES):
            name = f"{identity:05d}-{index:02d}.jpg"
            reid.append((name, identity, index % NUM_CAMERAS))
            yield _Item((f"reid/{name}",), partial(_image_file, seed, identity, index))
        split = "train" if identity < first + count // 2 else "test"
        for index in range(REID_IMAGES, REID_IMAGES + PARSING_IMAGES):
            name = f"{identity:05d}-{index:02d}"
            parsing.append((f"{name}.jpg", f"{name}.png", split))
            draw = partial(_person_files, seed, identity, index)
            yield _Item((f"parsing/{name}.jpg", f"parsing/{name}.png"), draw)
    yield _table("reid/labels.csv", ("file", "pid", "cam"), reid)
    yield _table("parsing/labels.csv", ("file", "mask", "split"), parsing)
    yield from _classes("parsing")


def _shuffled(size: Synthetic, seed: int) -> list[tuple[int, int]]:
    """All (identity, picture) pairs in an order that keeps no identity together."""
    pairs = [(i, k) for i in range(size.identities) for k in range(size.images_per_identity)]
    return sorted(
        pairs, key=lambda pair: hashlib.blake2b(f"{seed}/{pair}".encode(), digest_size=8).digest()
    )


def _person_files(seed: int, identity: int, index: int) -> tuple[bytes, bytes]:
    person = draw_person(seed, identity, index)
    return _jpeg(person.image), _mask_png(person)


def _image_file(seed: int, identity: int, index: int) -> tuple[bytes]:
    return (_jpeg(draw_person(seed, identity, index).image),)


def _background_file(seed: int, number: int) -> tuple[bytes]:
    return (_jpeg(draw_background(seed, number)),)


def _jpeg(image: np.ndarray) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY, "RGB", "420")
    return data


def _mask_png(person: Person) -> bytes:
    image = Image.fromarray(person.parts).convert("P")
    image.putpalette(_PALETTE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _classes(folder: str) -> Iterator[_Item]:
    data = json.dumps(PARTS).encode()
    yield _Item((f"{folder}/classes.json",), lambda: (data,))


def _table(path: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> _Item:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return _Item((path,), lambda: (text.getvalue().encode(),))


def _publish(folder: Path, name: str, data: bytes) -> None:
    aside = folder / _ASIDE / f"{name.replace('/', '-')}.{os.getpid()}"
    aside.write_bytes(data)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(aside, target)
