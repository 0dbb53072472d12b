"""Decoding: sizes from headers, upright pixels, damage and bombs refused."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.decode import decode_rgb, read_header
from dpal.base.errors import DataError
from dpal.base.telemetry import DECODE_FALLBACK, MemoryTelemetry

MANY = 10**6


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 255 // height, columns * 255 // width, (rows + columns) % 200]
    return np.stack(channels, axis=2).astype(np.uint8)


def test_png_comes_back_exactly_and_jpeg_nearly() -> None:
    pixels = ramp(60, 40)
    assert np.array_equal(decode_rgb(encode(Image.fromarray(pixels)), MANY), pixels)
    jpeg = decode_rgb(encode(Image.fromarray(pixels), "JPEG", quality=95), MANY)
    assert jpeg.shape == (60, 40, 3)
    assert np.abs(jpeg.astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(ramp(64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", quality=95, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode_rgb(data, MANY)
    header = read_header(data)
    assert (header.height, header.width) == pixels.shape[:2] == wanted.shape[:2]
    assert np.abs(pixels.astype(int) - wanted).max() <= 3


def test_grey_palette_alpha_and_cmyk_become_rgb() -> None:
    colour = Image.fromarray(ramp(40, 50))
    for mode, kind in (
        ("L", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
    ):
        pixels = decode_rgb(encode(colour.convert(mode), kind), MANY)
        assert pixels.shape == (40, 50, 3), mode
        assert pixels.dtype == np.uint8


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    deep = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    pixels = decode_rgb(encode(Image.fromarray(deep)), MANY)
    assert np.array_equal(pixels[:, :, 1], (deep >> 8).astype(np.uint8))


def test_pillow_steps_in_and_is_counted() -> None:
    telemetry = MemoryTelemetry()
    data = encode(Image.fromarray(ramp(40, 40)), "JPEG")
    odd = data[:-2] + b"\0\0\0\1" + data[-2:]  # bytes of a camera before the end marker
    assert np.array_equal(decode_rgb(odd, MANY, telemetry=telemetry), decode_rgb(data, MANY))
    assert telemetry.values[DECODE_FALLBACK.name,] == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
def test_truncated_images_are_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 100, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(DataError, match="not decodable"):
        decode_rgb(data[: int(len(data) * share)], MANY)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"GIF89a" + bytes(50), b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not decodable"):
        decode_rgb(data, MANY)


def png_bomb(side: int) -> bytes:
    """A valid PNG header of side x side pixels, with a little compressed nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10**6))
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_without_memory_or_time() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(DataError, match="50000 x 50000 pixels"):
        decode_rgb(png_bomb(50_000), 64_000_000)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG"]), st.data())
def test_damaged_bytes_give_pixels_or_a_data_error_and_nothing_else(
    kind: str, draw: st.DataObject
) -> None:
    data = bytearray(encode(Image.fromarray(ramp(20, 20)), kind))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        pixels = decode_rgb(bytes(data), 100_000)
    except DataError:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


def test_pixels_land_in_the_memory_that_is_handed_in() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(Image.fromarray(ramp(60, 40)), kind)
        wanted = decode_rgb(data, MANY)
        exact = np.full((60, 40, 3), 7, np.uint8)
        found = decode_rgb(data, MANY, out=exact)
        assert np.shares_memory(found, exact)
        assert np.array_equal(exact, wanted)
        scratch = np.full(60 * 40 * 3 + 5, 7, np.uint8)
        found = decode_rgb(data, MANY, out=scratch)
        assert np.shares_memory(found, scratch)
        assert np.array_equal(found, wanted)
        assert scratch[-5:].tolist() == [7] * 5


@pytest.mark.parametrize("shape", [(40, 60, 3), (61, 40, 3), (60 * 40 * 3 - 1,)])
def test_memory_that_does_not_fit_is_left_alone(shape: tuple[int, ...]) -> None:
    data = encode(Image.fromarray(ramp(60, 40)), "JPEG")
    other = np.full(shape, 7, np.uint8)
    assert np.array_equal(decode_rgb(data, MANY, out=other), decode_rgb(data, MANY))
    assert (other == 7).all()


@pytest.mark.parametrize("out", [np.zeros((60, 40, 3)), np.zeros((120, 40, 3), np.uint8)[::2]])
def test_memory_of_another_kind_is_a_mistake_of_the_caller(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="contiguous uint8"):
        decode_rgb(encode(Image.fromarray(ramp(60, 40)), "JPEG"), MANY, out=out)


@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_and_damaged_images_fill_the_memory_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(ramp(64, 32)), "JPEG", exif=exif)
    odd = data[:-2] + b"\0\0\0\1" + data[-2:]
    for one in (data, odd):
        wanted = decode_rgb(one, MANY)
        out = np.zeros_like(wanted)
        assert np.shares_memory(decode_rgb(one, MANY, out=out), out)
        assert np.array_equal(out, wanted)
