"""Made files in the published layouts of person data sets, for the tests of their readers."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.source import Item, Source
from data_tools.sources import open_source
from dpal.base.inputs import Data, Storage


def jpeg(seed: int, size: tuple[int, int] = (40, 24)) -> bytes:
    """A noise picture `size` = (height, width) as JPEG bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_pictures(folder: Path, *names: str) -> dict[str, bytes]:
    """Pictures below `folder`; their bytes by name."""
    made = {name: jpeg(seed) for seed, name in enumerate(names)}
    for name, contents in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return made


def opened(url: str | Path, storage: Storage | None = None, **keys: Any) -> Source:
    """The source at `url` with these keys of the recipe's `data`."""
    data = Data(images=(str(url),), **keys)
    return open_source(str(url), data, storage or Storage())


def items_of(url: str | Path, **keys: Any) -> list[Item]:
    """All items of the source at `url`; sorted, named once, and told the same when asked again."""
    source = opened(url, **keys)
    items = list(source.items())
    names = [item.name for item in items]
    assert names == sorted(set(names))
    assert list(source.items()) == items
    return items


def coco(**changes: Any) -> dict[str, Any]:
    """COCO person keypoints: two persons, a crowd and a dog in a.jpg, nobody in b.jpg."""
    points = [float(number) for number in range(51)]
    person = {"image_id": 7, "category_id": 1, "iscrowd": 0}
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 24},
            {"id": 9, "file_name": "b.jpg", "height": 40, "width": 24},
        ],
        "annotations": [
            {
                **person,
                "id": 1,
                "bbox": [1, 2, 10, 20],
                "keypoints": points,
                "num_keypoints": 17,
                "segmentation": [[1, 2, 11, 2, 11, 22.5]],
            },
            {
                **person,
                "id": 2,
                "bbox": [3.5, 4, 5, 6],
                "keypoints": [0] * 51,
                "num_keypoints": 0,
                "segmentation": {"size": [40, 24], "counts": [0, 3, 957]},
            },
            {**person, "id": 3, "bbox": [0, 0, 24, 40], "iscrowd": 1},
            {**person, "id": 4, "bbox": [5, 5, 0, 9]},
            {**person, "id": 5, "bbox": [1, 1, 5, 5], "category_id": 2},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}],
    } | changes


def odgt(picture: str, *boxes: Mapping[str, Any]) -> str:
    """One line of CrowdHuman annotations."""
    return json.dumps({"ID": picture, "gtboxes": list(boxes)}) + "\n"


def gtbox(left: int, **changes: Any) -> dict[str, Any]:
    """A person 10 x 20 whose box begins at `left`, with the upper half visible."""
    return {
        "tag": "person",
        "fbox": [left, -2, 10, 20],
        "vbox": [left, 0, 10, 10],
        "hbox": [left + 3, 0, 4, 4],
        "head_attr": {"ignore": 0, "occ": 0, "unsure": 0},
        "extra": {"box_id": 0, "occ": 0},
    } | changes


def write_tar(
    path: Path, members: Mapping[str, bytes], tar_format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar as others write it, with a folder before its members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("below")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, contents in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))
    return path


def write_lmdb(folder: Path, values: Mapping[bytes, bytes]) -> Path:
    """An LMDB environment of these values."""
    import lmdb

    with (
        lmdb.open(str(folder), map_size=2**26) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return folder
