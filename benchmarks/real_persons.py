"""Unpack real person sets into the folders that `real_persons.yaml` and the real grids read.

    python benchmarks/real_persons.py SHARED_DATA OUT

SHARED_DATA holds `<set>/images.zip` and label files; OUT receives

    persons/      pretraining images, no label: cuhk03 train, lsp_extended up to 3,200, ccp
                  photos without a mask, inria crops
    backgrounds/  coco128 scenes without a person
    scenes/       penn_fudan, and coco128 scenes with two persons or more, with the persons' boxes
                  (boxes.csv, as `data.scenes` reads it)
    reid/         cuhk03 val, identities that are not in persons/ (labels.csv: file,pid,cam)
    parsing/      ccp photos with a mask, classes merged (labels.csv: file,mask,split)
    weights/      the teachers of these recipes, from the `weights` folder beside SHARED_DATA

Only members that the label files or a fixed pattern name are read, and the name of every written
file is made here, so no path in an archive becomes a path on disk. A folder is published when it
is complete; a second run does only what is missing.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpal.base.errors import DataError, DpalError

MAX_MEMBER_BYTES = 8_000_000
LSP_PRETRAINING = 3200
TEACHERS = (
    "reid-0267_global_dense.onnx",
    "vit_small_patch14_saliency_timm_fp16.pth",
    "mobile_sam.pt",
)
PARSING_TEST_SHARE = 4  # the last quarter by name: neighbours are often the same person

# Clothing Co-Parsing's 59 names in 9 groups that a person crop of 256 x 128 can resolve.
PARTS: dict[str, tuple[str, ...]] = {
    "background": ("null",),
    "hair": ("hair",),
    "skin": ("skin",),
    "upper clothes": (
        *("blouse", "bodysuit", "bra", "hoodie", "intimate", "jumper", "shirt", "sweater"),
        *("sweatshirt", "t-shirt", "top", "vest"),
    ),
    "outerwear": ("blazer", "cape", "cardigan", "coat", "jacket", "suit"),
    "dress": ("dress", "romper", "swimwear"),
    "lower clothes": (
        *("jeans", "leggings", "panties", "pants", "shorts", "skirt"),
        *("socks", "stockings", "tights"),
    ),
    "shoes": (
        *("boots", "clogs", "flats", "heels", "loafers", "pumps", "sandals", "shoes"),
        *("sneakers", "wedges"),
    ),
    "bags and accessories": (
        *("accessories", "bag", "belt", "bracelet", "earrings", "glasses", "gloves", "hat"),
        *("necklace", "purse", "ring", "scarf", "sunglasses", "tie", "wallet", "watch"),
    ),
}


def merge_table(names: list[str]) -> np.ndarray:
    """Lookup from a ccp class index to its part, uint8 [256]; indices without a name are ignored.

    Raises:
        DataError: `names` and `PARTS` do not name the same classes, each once.
    """
    part_of = {name: part for part, group in enumerate(PARTS.values()) for name in group}
    listed = sum(len(group) for group in PARTS.values())
    if sorted(names) != sorted(part_of) or listed != len(part_of):
        raise DataError(f"ccp/classes.json and the merge table differ: {set(names) ^ set(part_of)}")
    table = np.full(256, 255, np.uint8)
    for index, name in enumerate(names):
        table[index] = part_of[name]
    return table


def unpack(data: Path, out: Path) -> dict[str, int]:
    """Write the folders and return the number of files in each. Raises DataError."""
    writers: dict[str, Callable[[Path, Path], None]] = {
        "persons": _persons,
        "backgrounds": _backgrounds,
        "scenes": _scenes,
        "reid": _reid,
        "parsing": _parsing,
        "weights": _weights,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")  # nothing of it may enter a repository
    counts = {}
    for name, write in writers.items():
        final, partial = out / name, out / f"{name}.partial"
        if not final.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(data, partial)
            os.replace(partial, final)
        pattern = "*" if name == "weights" else "*.jpg"
        counts[name] = sum(1 for _ in final.glob(pattern))
    return counts


def _persons(data: Path, folder: Path) -> None:
    train = [row["file"] for row in _rows(data, "cuhk03_labeled") if row["split"] == "train"]
    unmasked = [row["file"] for row in _rows(data, "ccp") if row["has_mask"] == "0"]
    lsp = sorted(_names(data, "lsp_extended"))[:LSP_PRETRAINING]
    inria = sorted(_names(data, "inria_person_crops"))
    wanted = (
        ("cuhk03", "cuhk03_labeled", train),
        ("lsp", "lsp_extended", lsp),
        ("ccp", "ccp", unmasked),
        ("inria", "inria_person_crops", inria),
    )
    for prefix, source, files in wanted:
        for file, content in _members(data, source, files):
            (folder / f"{prefix}-{_flat(file)}").write_bytes(content)


def _backgrounds(data: Path, folder: Path) -> None:
    scenes = _annotations(data, "coco128_seg")
    # 'persons' lists polygons; class 0 of the raw rows catches people without one.
    empty = [
        scene["file"]
        for scene in scenes
        if not scene["persons"] and not re.search(r"^0 ", scene["raw_yolo"], re.MULTILINE)
    ]
    for file, content in _members(data, "coco128_seg", empty):
        (folder / f"coco-{_flat(file)}").write_bytes(content)


def _scenes(data: Path, folder: Path) -> None:
    penn = _annotations(data, "penn_fudan")
    coco = _annotations(data, "coco128_seg")
    boxes_of = {
        ("penn", "penn_fudan"): {scene["file"]: scene["boxes"] for scene in penn},
        ("coco", "coco128_seg"): {
            scene["file"]: [person["box"] for person in scene["persons"]]
            for scene in coco
            if len(scene["persons"]) > 1
        },
    }
    rows: list[tuple[object, ...]] = []
    for (prefix, source), boxes in boxes_of.items():
        for file, content in _members(data, source, boxes):
            name = f"{prefix}-{_flat(file)}"
            (folder / name).write_bytes(content)
            rows += [(name, *box) for box in boxes[file]]
    _write_csv(folder / "boxes.csv", ("file", "left", "top", "right", "bottom"), rows)


def _reid(data: Path, folder: Path) -> None:
    rows = [row for row in _rows(data, "cuhk03_labeled") if row["split"] == "val"]
    for file, content in _members(data, "cuhk03_labeled", [row["file"] for row in rows]):
        (folder / _flat(file)).write_bytes(content)
    labels = [(_flat(row["file"]), int(row["pid"]), int(row["cam"])) for row in rows]
    _write_csv(folder / "labels.csv", ("file", "pid", "cam"), labels)


def _parsing(data: Path, folder: Path) -> None:
    table = merge_table(json.loads((data / "ccp" / "classes.json").read_text()))
    photos = sorted(row["file"] for row in _rows(data, "ccp") if row["has_mask"] == "1")
    masks = [file.replace("photos/", "masks/").replace(".jpg", ".png") for file in photos]
    for file, content in _members(data, "ccp", photos):
        (folder / _flat(file)).write_bytes(content)
    for file, content in _members(data, "ccp", masks):
        merged = table[np.asarray(Image.open(io.BytesIO(content)))]
        Image.fromarray(merged).save(folder / _flat(file), optimize=True)
    first_test = len(photos) - len(photos) // PARSING_TEST_SHARE
    labels = [
        (_flat(photo), _flat(mask), "train" if index < first_test else "test")
        for index, (photo, mask) in enumerate(zip(photos, masks, strict=True))
    ]
    _write_csv(folder / "labels.csv", ("file", "mask", "split"), labels)
    (folder / "classes.json").write_text(json.dumps(list(PARTS)))


def _weights(data: Path, folder: Path) -> None:
    for name in TEACHERS:
        source = data.resolve().parent / "weights" / name
        if not source.is_file():
            raise DataError(f"teacher weights {str(source)!r} do not exist")
        shutil.copyfile(source, folder / name)


def _rows(data: Path, source: str) -> list[dict[str, str]]:
    path = data / source / "labels.csv"
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist")
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _annotations(data: Path, source: str) -> list[dict[str, Any]]:
    path = data / source / "annotations.json"
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist")
    scenes: list[dict[str, Any]] = json.loads(path.read_text())
    return scenes


def _archive(data: Path, source: str) -> zipfile.ZipFile:
    path = data / source / "images.zip"
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(path)!r} is not a readable zip file ({error})") from None


def _names(data: Path, source: str) -> list[str]:
    with _archive(data, source) as archive:
        return [name for name in archive.namelist() if name.endswith(".jpg")]


def _members(data: Path, source: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    with _archive(data, source) as archive:
        for name in names:
            try:
                info = archive.getinfo(name)
            except KeyError:
                raise DataError(f"{source}/images.zip has no member {name!r}") from None
            if info.file_size > MAX_MEMBER_BYTES:
                raise DataError(f"{source}/images.zip: {name!r} has {info.file_size} bytes")
            yield name, archive.read(info)


def _flat(member: str) -> str:
    """The last part of a member's name, refused unless it is a plain file name."""
    name = member.rpartition("/")[2]
    if not re.fullmatch(r"\w[\w-]*\.(jpg|png)", name):
        raise DataError(f"member {member!r} does not end in a plain .jpg or .png name")
    return name


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with <set>/images.zip")
    parser.add_argument("out", type=Path, help="folder to write, e.g. real")
    args = parser.parse_args()
    try:
        counts = unpack(args.data, args.out)
    except DpalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("  ".join(f"{name}: {count} files" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
