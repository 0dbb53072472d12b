"""Images per CPU second of each way to decode, in turns: small crops, and boxes of large scenes.

    python benchmarks/bench_decode.py                       # drawn persons
    python benchmarks/bench_decode.py --images FOLDER       # JPEGs and boxes.csv, as data.scenes

Boxes are cut out and then resized (bicubic); only in the first row of a table of scenes is the
resize given the whole scene and the box, as `render` does. `decode_region` is checked to
give the pixels of the second row; where a table says "other pixels", they are not these.
The ratio is to the first row of a table, within a round.
"""

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from timing import interleave, table

from data_tools.decode import decode_rgb
from data_tools.jpeg_region import is_available
from data_tools.regions import decode_region
from dpal.views.render import render
from dpal.views.specs import Box, ViewSpec

HEIGHT, WIDTH = 256, 128
BICUBIC = Image.Resampling.BICUBIC
MANY = 1 << 30
LARGE = 512  # pixels: the height of a large box in a scene of 1024


class Person(NamedTuple):
    """An encoded scene, its height and width, and the box of one person in it."""

    data: bytes
    size: tuple[int, int]
    box: Box


def main() -> None:
    """Print one table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs with a boxes.csv")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=150, help="boxes a round (default 150)")
    arguments = parser.parse_args()
    if not is_available():
        print("no libturbojpeg 3 here: `decode_region` decodes whole images\n")
    scenes = _read(arguments.images) if arguments.images else _drawn(arguments.count // 3 + 1)
    small = [_crop(image, box) for image, box in scenes[: arguments.count]]
    _report(f"{len(small)} crops of {HEIGHT} x {WIDTH}", _crop_ways(small), len(small), arguments)
    for side, lowest in ((512, 64), (1024, LARGE)):
        persons = [_scaled(image, box, side) for image, box in scenes]
        persons = [p for p in persons if p.box.height >= lowest][: arguments.count]
        share = np.mean([p.box.height * p.box.width / (p.size[0] * p.size[1]) for p in persons])
        title = f"{len(persons)} boxes >= {lowest} px high in scenes of {side} px -> "
        title += f"{HEIGHT} x {WIDTH}; a box is {share:.0%} of its scene"
        _report(title, _scene_ways(persons), len(persons), arguments)


def _report(
    title: str,
    ways: dict[str, Callable[[], object]],
    count: int,
    arguments: argparse.Namespace,
) -> None:
    times = interleave(ways, arguments.rounds)
    first = next(iter(times.values()))
    rows = [(name, count / time.median, first.over(time)) for name, time in times.items()]
    print(f"{title}\n{table(('way', 'images/s', 'ratio'), rows)}\n")


def _crop_ways(images: list[bytes]) -> dict[str, Callable[[], object]]:
    memory = np.empty((HEIGHT, WIDTH, 3), np.uint8)

    def pillow(data: bytes) -> object:
        return np.asarray(Image.open(io.BytesIO(data)))

    def fast(data: bytes) -> object:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, buffer=memory)

    each: dict[str, Callable[[bytes], object]] = {
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "decode_rgb": lambda data: decode_rgb(data, MANY),
        "simplejpeg, into given memory": lambda d: simplejpeg.decode_jpeg(d, "RGB", buffer=memory),
        "decode_rgb, into given memory": lambda data: decode_rgb(data, MANY, out=memory),
        "simplejpeg fast DCT, given memory (other pixels)": fast,
        "Pillow": pillow,
    }
    return {name: lambda run=run: [run(data) for data in images] for name, run in each.items()}


def _scene_ways(persons: list[Person]) -> dict[str, Callable[[], object]]:
    memory = np.empty(max(p.size[0] * p.size[1] for p in persons) * 3, np.uint8)

    def rendered(person: Person) -> np.ndarray:
        spec = ViewSpec(person.box, flip=False)
        return render(simplejpeg.decode_jpeg(person.data, "RGB"), spec, (HEIGHT, WIDTH))

    def whole(person: Person, out: np.ndarray | None = None) -> np.ndarray:
        return _resized(simplejpeg.decode_jpeg(person.data, "RGB", buffer=out), *person.box)

    def part(person: Person, out: np.ndarray | None = None) -> np.ndarray:
        found = decode_region(person.data, person.box, MANY, out=out)
        top, left, height, width = person.box
        return _resized(found.pixels, top - found.top, left - found.left, height, width)

    def shrunk(person: Person) -> np.ndarray:
        found = decode_region(person.data, person.box, MANY, at_least=(HEIGHT, WIDTH))
        top, left, height, width = (round(number / found.shrink) for number in person.box)
        return _resized(found.pixels, top - found.top, left - found.left, height, width)

    def draft(person: Person) -> np.ndarray:
        picture = Image.open(io.BytesIO(person.data))
        height, width = person.size
        box = person.box
        picture.draft("RGB", (width * WIDTH // box.width, height * HEIGHT // box.height))
        factor = picture.width / width
        return _resized(np.asarray(picture), *(int(number * factor) for number in box))

    def pillow(person: Person) -> np.ndarray:
        picture = Image.open(io.BytesIO(person.data)).crop(_edges(person.box))
        return np.asarray(picture.resize((WIDTH, HEIGHT), BICUBIC))

    for person in persons:
        assert np.array_equal(part(person), whole(person))
    each: dict[str, Callable[[Person], np.ndarray]] = {
        "simplejpeg, whole scene, resized from it": rendered,
        "simplejpeg, whole scene": whole,
        "decode_region": part,
        "simplejpeg, into given memory": lambda person: whole(person, memory),
        "decode_region, into given memory": lambda person: part(person, memory),
        "decode_region, shrunk (other pixels)": shrunk,
        "Pillow draft (other pixels)": draft,
        "Pillow": pillow,
    }
    return {name: lambda run=run: [run(one) for one in persons] for name, run in each.items()}


def _resized(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    return np.asarray(Image.fromarray(cut).resize((WIDTH, HEIGHT), BICUBIC))


def _edges(box: Box) -> tuple[int, int, int, int]:
    return box.left, box.top, box.left + box.width, box.top + box.height


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _crop(image: Image.Image, box: Box) -> bytes:
    return _encode(image.resize((WIDTH, HEIGHT), BICUBIC, _edges(box)))


def _scaled(image: Image.Image, box: Box, side: int) -> Person:
    factor = side / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    top, left = int(box.top * factor), int(box.left * factor)
    height = min(max(int(box.height * factor), 1), size[1] - top)
    width = min(max(int(box.width * factor), 1), size[0] - left)
    return Person(_encode(image.resize(size, BICUBIC)), size[::-1], Box(top, left, height, width))


def _read(folder: Path) -> list[tuple[Image.Image, Box]]:
    with (folder / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        left, top, right, bottom = (int(float(row[k])) for k in ("left", "top", "right", "bottom"))
        if right - left > 15 and bottom - top > 31:
            with Image.open(folder / row["file"]) as picture:
                found.append((picture.convert("RGB"), Box(top, left, bottom - top, right - left)))
    return found[:: max(len(found) // 400, 1)]


def _drawn(count: int) -> list[tuple[Image.Image, Box]]:
    """Scenes of textured noise and a person-shaped box, where no photographs are at hand."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), BICUBIC)
        grain = generator.normal(0, 6, (480, 640, 1))
        pixels = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
        for _person in range(3):
            height = int(generator.integers(130, 420))
            width = height * 2 // 5
            top = int(generator.integers(20, 480 - height))
            left = int(generator.integers(0, 640 - width))
            found.append((Image.fromarray(pixels), Box(top, left, height, width)))
    return found


if __name__ == "__main__":
    main()
