"""Decoding a box alone gives exactly the pixels that decoding everything gives."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_tools import regions
from data_tools.decode import decode_rgb
from data_tools.image_header import read_header
from data_tools.jpeg_region import is_available
from data_tools.regions import decode_region
from dpal.base.errors import DataError
from dpal.base.telemetry import DECODE_FALLBACK, MemoryTelemetry
from dpal.views.specs import Box

MANY = 10**7
SAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
needs_library = pytest.mark.skipif(
    not is_available(), reason="no libturbojpeg 3 (wheel `turbojpeg`): images are decoded whole"
)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with edges, so that chroma interpolation matters."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, sampling: str = "420", **options: object) -> bytes:
    if not options and sampling != "Gray":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 85, "RGB", sampling)
    if sampling == "Gray":
        grey = np.ascontiguousarray(pixels[:, :, :1])
        return simplejpeg.encode_jpeg(grey, 85, "GRAY", "Gray")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def inside(region: regions.Region, box: Box) -> np.ndarray:
    top, left = box.top - region.top, box.left - region.left
    assert top >= 0
    assert left >= 0
    return region.pixels[top : top + box.height, left : left + box.width]


@st.composite
def boxes(draw: st.DrawFn, height: int, width: int) -> Box:
    top = draw(st.integers(0, height - 1))
    left = draw(st.integers(0, width - 1))
    return Box(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_box_has_the_pixels_of_the_whole_image(draw: st.DataObject) -> None:
    height, width = draw.draw(st.integers(1, 170)), draw.draw(st.integers(1, 170))
    sampling = draw.draw(st.sampled_from(SAMPLINGS))
    data = encode(photo(height, width, height * width), sampling)
    box = draw.draw(boxes(height, width))
    whole = decode_rgb(data, MANY)
    wanted = whole[box.top : box.top + box.height, box.left : box.left + box.width]
    region = decode_region(data, box, MANY)
    assert region.shrink == 1
    assert np.array_equal(inside(region, box), wanted)


@needs_library
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_is_decoded_is_the_box_and_not_the_image(sampling: str) -> None:
    data = encode(photo(400, 600), sampling)
    pixels = decode_region(data, Box(150, 200, 100, 80), MANY).pixels
    assert pixels.shape[0] <= 100 + 2 + 16 + 2
    assert pixels.shape[1] <= 80 + 2 + 32 + 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_turned_images_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(90, 141), exif=exif, quality=90)
    whole = decode_rgb(data, MANY)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert whole.shape[:2] == (turned.height, turned.width)
    generator = np.random.default_rng(orientation)
    for _ in range(20):
        top, left = (int(generator.integers(0, side)) for side in whole.shape[:2])
        height = int(generator.integers(1, whole.shape[0] - top + 1))
        width = int(generator.integers(1, whole.shape[1] - left + 1))
        box = Box(top, left, height, width)
        wanted = whole[top : top + height, left : left + width]
        assert np.array_equal(inside(decode_region(data, box, MANY), box), wanted)


@pytest.mark.parametrize("kind", ["progressive", "cmyk", "png", "damaged"])
def test_what_cannot_be_decoded_in_part_is_decoded_whole(kind: str) -> None:
    pixels = photo(90, 120)
    data = encode(pixels, progressive=True) if kind == "progressive" else encode(pixels)
    if kind in ("cmyk", "png"):
        buffer = io.BytesIO()
        picture = Image.fromarray(pixels).convert("CMYK" if kind == "cmyk" else "RGB")
        picture.save(buffer, "JPEG" if kind == "cmyk" else "PNG")
        data = buffer.getvalue()
    if kind == "damaged":
        data = data[:-2] + b"\0\0\0\1" + data[-2:]
    telemetry = MemoryTelemetry()
    region = decode_region(data, Box(10, 20, 60, 70), MANY, telemetry=telemetry)
    whole = decode_rgb(data, MANY)
    assert np.array_equal(inside(region, Box(10, 20, 60, 70)), whole[10:70, 20:90])
    if kind != "damaged":
        assert region.pixels.shape == whole.shape
        assert telemetry.values == {}


@needs_library
def test_damage_in_what_is_read_is_left_to_the_whole_decoder() -> None:
    data = bytearray(encode(photo(200, 200)))
    middle = len(data) // 2
    data[middle : middle + 8] = b"\xff\xd9\xff\xd9\xff\xd9\xff\xd9"
    telemetry = MemoryTelemetry()
    region = decode_region(bytes(data), Box(150, 100, 50, 50), MANY, telemetry=telemetry)
    assert np.array_equal(region.pixels, decode_rgb(bytes(data), MANY))
    assert telemetry.values[DECODE_FALLBACK.name,] == 1


@needs_library
def test_a_large_box_is_shrunk_only_when_it_is_asked_for_and_never_below_the_size() -> None:
    smooth = np.asarray(Image.fromarray(photo(60, 80)).resize((800, 600), Image.Resampling.BICUBIC))
    data = encode(smooth)
    whole = decode_rgb(data, MANY)
    for at_least, shrink in (((64, 32), 8), ((65, 32), 4), ((256, 128), 2), ((257, 1), 1)):
        box = Box(37, 101, 512, 256)
        region = decode_region(data, box, MANY, at_least=at_least)
        assert region.shrink == shrink
        corner = (box.left / shrink - region.left, box.top / shrink - region.top)
        place = (*corner, corner[0] + box.width / shrink, corner[1] + box.height / shrink)
        found = Image.fromarray(region.pixels).resize((32, 64), Image.Resampling.BICUBIC, place)
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        wanted = Image.fromarray(whole).resize((32, 64), Image.Resampling.BICUBIC, edges)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).mean() < 2


@pytest.mark.parametrize(
    "box", [Box(-1, 0, 5, 5), Box(0, 0, 91, 5), Box(0, 119, 5, 2), Box(0, 0, 0, 5)]
)
def test_a_box_that_leaves_the_image_is_a_data_error(box: Box) -> None:
    with pytest.raises(DataError, match="not inside an image of 120 x 90"):
        decode_region(encode(photo(90, 120)), box, MANY)


def test_a_large_image_is_refused_by_its_header() -> None:
    with pytest.raises(DataError, match="too large"):
        decode_region(encode(photo(90, 120)), Box(0, 0, 5, 5), 90 * 120 - 1)


def test_without_the_library_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data, box = encode(photo(90, 120)), Box(31, 40, 20, 20)
    before = inside(decode_region(data, box, MANY), box)
    monkeypatch.setattr(regions, "decode_part", lambda *_args: None)
    region = decode_region(data, box, MANY)
    assert region.pixels.shape == (90, 120, 3)
    assert np.array_equal(inside(region, box), before)


@pytest.mark.parametrize("kind", ["part", "whole", "progressive"])
def test_pixels_land_in_scratch_that_is_long_enough(kind: str) -> None:
    data = encode(photo(90, 120), progressive=kind == "progressive", quality=90)
    box = Box(0, 0, 90, 120) if kind == "whole" else Box(20, 30, 20, 20)
    wanted = decode_region(data, box, MANY)
    scratch = np.full(90 * 120 * 3 + 7, 9, np.uint8)
    found = decode_region(data, box, MANY, out=scratch)
    assert np.shares_memory(found.pixels, scratch)
    assert np.array_equal(found.pixels, wanted.pixels)
    assert scratch[-7:].tolist() == [9] * 7
    short = np.full(20 * 20 * 3 - 1, 9, np.uint8)
    assert np.array_equal(decode_region(data, box, MANY, out=short).pixels, wanted.pixels)
    assert (short == 9).all()
    with pytest.raises(ValueError, match="flat contiguous uint8"):
        decode_region(data, box, MANY, out=np.zeros((90, 120, 3), np.uint8))


def test_threads_do_not_disturb_each_other() -> None:
    pictures = [encode(photo(100 + seed, 150, seed)) for seed in range(8)]
    whole = [decode_rgb(data, MANY) for data in pictures]

    def check(number: int) -> bool:
        index, box = number % 8, Box(number % 60, number % 90, 31, 40)
        found = inside(decode_region(pictures[index], box, MANY), box)
        wanted = whole[index][box.top : box.top + 31, box.left : box.left + 40]
        return np.array_equal(found, wanted)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(400)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_give_pixels_or_a_data_error(draw: st.DataObject) -> None:
    data = bytearray(encode(photo(60, 80), draw.draw(st.sampled_from(SAMPLINGS))))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(2, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(data))
        box = draw.draw(boxes(min(header.height, 100), min(header.width, 100)))
        region = decode_region(bytes(data), box, 100_000)
    except DataError:
        return
    assert inside(region, box).shape == (box.height, box.width, 3)
