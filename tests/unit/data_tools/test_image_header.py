"""Headers: sizes and orientations, and files that ask a decoder for far more than they show."""

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import image_header
from data_tools.decode import decode_rgb
from data_tools.image_header import MAX_SCANS, read_header
from dpal.base.errors import DataError

MANY = 64_000_000


def noise(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * width)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def jpeg(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["444", "422", "420", "440"]))
def test_size_and_coded_unit_are_the_encoders(height: int, width: int, sampling: str) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    header = read_header(simplejpeg.encode_jpeg(pixels, 80, "RGB", sampling))
    unit = {"444": (8, 8), "422": (8, 16), "420": (16, 16), "440": (16, 8)}[sampling]
    assert header == ("jpg", height, width, 1, unit)


def test_only_sequential_colour_and_grey_can_be_decoded_in_part() -> None:
    picture = noise(40, 60)
    assert read_header(jpeg(picture)).mcu == (16, 16)
    assert read_header(jpeg(picture.convert("L"))).mcu == (8, 8)
    assert read_header(jpeg(picture, progressive=True)).mcu is None
    assert read_header(jpeg(picture.convert("CMYK"))).mcu is None


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["<", ">"]),
    st.lists(st.tuples(st.integers(1, 0xFFFF), st.integers(0, 0xFFFF)), max_size=5),
    st.integers(0, 12),
    st.integers(0, 30),
)
def test_orientation_is_what_pillow_reads(
    order: str, others: list[tuple[int, int]], orientation: int, gap: int
) -> None:
    entries = dict(others) | ({0x0112: orientation} if orientation else {})
    entries.pop(0x8769, None)  # pointers to further directories
    entries.pop(0x8825, None)
    start = struct.pack(f"{order}HI", 42, 8 + gap)
    table = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(entries.items())
    )
    tiff = (b"II" if order == "<" else b"MM") + start + bytes(gap)
    tiff += struct.pack(f"{order}H", len(entries)) + table + bytes(4)
    data = jpeg(noise(8, 16))
    data = data[:2] + segment(0xE1, b"Exif\0\0" + tiff) + data[2:]
    with Image.open(io.BytesIO(data)) as picture:
        wanted = picture.getexif().get(0x0112, 1)
    header = read_header(data)
    assert header.orientation == (wanted if 1 <= wanted <= 8 else 1)
    assert (header.height, header.width) == ((16, 8) if header.orientation > 4 else (8, 16))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_damaged_exif_never_costs_an_image(tiff: bytes) -> None:
    data = jpeg(noise(8, 16))
    for start in (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        exif = segment(0xE1, b"Exif\0\0" + start + tiff)
        header = read_header(data[:2] + exif + data[2:])
        assert {header.height, header.width} == {8, 16}
        assert 1 <= header.orientation <= 8


def test_orientation_in_xmp_alone_is_read_beside_exif_as_before() -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    data = jpeg(noise(8, 16), exif=exif, xmp=xmp)
    with Image.open(io.BytesIO(data)) as picture:
        assert read_header(data).orientation == picture.getexif().get(0x0112) == 6


def test_bytes_between_segments_are_left_to_libjpeg() -> None:
    data = jpeg(noise(8, 16))
    cut = 4 + struct.unpack_from(">H", data, 4)[0]
    header = read_header(data[:cut] + b"stray" + data[cut:])
    assert (header.height, header.width, header.mcu) == (8, 16, None)


@pytest.mark.parametrize("components", [0, 5, 10, 255])
def test_absurd_component_counts_are_refused(components: int) -> None:
    frame = struct.pack(">BHHB", 8, 64, 64, components) + b"\1\x11\0" * components
    data = b"\xff\xd8" + segment(0xC0, frame) + segment(0xDA, b"\0" * 6) + b"\xff\xd9"
    with pytest.raises(DataError, match=f"announces {components} colour components"):
        decode_rgb(data, MANY)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_height_or_width_are_refused(size: tuple[int, int]) -> None:
    data = bytearray(jpeg(noise(8, 16)))
    data[(at := data.index(b"\xff\xc0") + 5) : at + 4] = struct.pack(">HH", *size)
    with pytest.raises(DataError, match="header is damaged"):
        read_header(bytes(data))


def test_megabytes_of_exif_are_walked_and_millions_of_segments_refused() -> None:
    data = jpeg(noise(8, 16))
    block = segment(0xE1, b"Exif\0\0" + bytes(65_000))
    assert read_header(data[:2] + block * 300 + data[2:]).height == 8  # 20 MB
    start = time.process_time()
    with pytest.raises(DataError, match="more than 2000 segments"):
        read_header(data[:2] + segment(0xE0, b"") * 2_000_000 + data[2:])
    assert time.process_time() - start < 1


def scan_bomb(height: int, width: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = jpeg(Image.new("RGB", (width, height), (9, 80, 200)), progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * scans + data[-2:]


def test_progressive_bombs_are_refused_before_they_are_decoded() -> None:
    bomb = scan_bomb(2000, 2000, MAX_SCANS)
    assert len(bomb) < 10**6 * 4
    start = time.process_time()
    with pytest.raises(DataError, match="more than 500 scans"):
        decode_rgb(bomb, MANY)
    assert time.process_time() - start < 0.5


def test_the_larger_the_image_the_fewer_scans_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = scan_bomb(200, 200, 30)
    assert decode_rgb(bomb, MANY).shape == (200, 200, 3)
    monkeypatch.setattr(image_header, "MAX_SCANNED_PIXELS", 20 * 200 * 200)
    with pytest.raises(DataError, match="more than 20 scans for 200 x 200"):
        decode_rgb(bomb, MANY)
    ordinary = jpeg(noise(200, 200), progressive=True)
    assert decode_rgb(ordinary, MANY).shape == (200, 200, 3)


def test_scans_of_a_sequential_image_are_counted_too() -> None:
    data = jpeg(noise(16, 16))
    frame = data.index(b"\xff\xc0")
    start = data.index(b"\xff\xda")
    one = data[start:-2]
    single = bytearray(one)
    single[4] = 1  # a scan of one component of three
    bomb = data[:start] + bytes(single) * 600 + data[-2:]
    assert frame < start
    with pytest.raises(DataError, match="more than 500 scans"):
        read_header(bomb)
    hidden = data[:start] + segment(0xFE, b"\xff\xda\0\x0c\3") + bytes(single) * 600 + data[-2:]
    with pytest.raises(DataError, match="more than 500 scans"):
        read_header(hidden)  # what a comment says is no scan


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache
def zeros(megabytes: int) -> bytes:
    pack = zlib.compressobj(9)
    return b"".join([*(pack.compress(bytes(2**20)) for _ in range(megabytes)), pack.flush()])


def png(height: int, width: int, data: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMBS = {
    "pixels": lambda: png(20, 20, zeros(200)),
    "text": lambda: png(20, 20, zeros(1), chunk(b"zTXt", b"k\0\0" + zeros(200))),
    "unicode text": lambda: png(20, 20, zeros(1), chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(200))),
    "profile": lambda: png(20, 20, zeros(1), chunk(b"iCCP", b"k\0\0" + zeros(200))),
    "many texts": lambda: png(20, 20, zeros(1), *[chunk(b"zTXt", b"k\0\0" + zeros(1))] * 200),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_a_png_inflates_to_beyond_its_pixels_takes_no_memory(
    kind: str, tmp_path: Path
) -> None:
    """In a process of its own, whose largest memory the kernel tells."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(BOMBS[kind]())
    assert bomb.stat().st_size < 2**20
    program = (
        "import resource, sys; from data_tools.decode import decode_rgb\n"
        "from dpal.base.errors import DataError\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(decode_rgb(data, 10**6).shape)\n"
        "except DataError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    outcome, grown = done.stdout.splitlines()
    assert outcome == "(20, 20, 3)" or outcome.startswith("image is not decodable")
    assert int(grown) < 90_000  # KiB; Pillow allows 64 MiB of text


def test_a_header_alone_takes_no_memory() -> None:
    data = jpeg(noise(8, 16))
    at = data.index(b"\xff\xc0") + 5
    large = data[:at] + struct.pack(">HH", 65_500, 65_500) + data[at + 4 :]
    tracemalloc.start()
    with pytest.raises(DataError, match="65500 x 65500 pixels"):
        decode_rgb(large, MANY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
