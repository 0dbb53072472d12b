"""Headers checked many at a time: the same samples as header by header, on any bytes."""

import io
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import tar
from data_tools.tar import BLOCK, index_tar
from dpal.base.errors import DataError

ALPHABET = "abz019-_."


def made(members: list[tuple[str, int]]) -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            out.addfile(info, io.BytesIO(b"\x07" * size))
    return bytearray(buffer.getvalue())


def slow(data: bytes) -> list[tar.Entry] | str:
    """What header by header says: samples, or an error."""
    try:
        entries, end = tar._index_any(data, "t")
        tar._check_end(data, end, "t")
    except DataError as error:
        return str(error)
    return entries


def either(data: bytes) -> list[tar.Entry] | str:
    try:
        return list(index_tar(data, "t"))
    except DataError as error:
        return str(error)


def mended(data: bytearray, offset: int) -> None:
    """Make the checksum of a header right again."""
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + BLOCK])


NAMES = st.text(ALPHABET, min_size=1, max_size=9)
SAMPLES = st.lists(st.tuples(NAMES, st.integers(0, 1300)), max_size=12)


@settings(max_examples=400, deadline=None)
@given(SAMPLES, st.data())
def test_the_same_as_header_by_header_on_whole_and_damaged_tars(
    members: list[tuple[str, int]], draw: st.DataObject
) -> None:
    data = made(members)
    for _ in range(draw.draw(st.integers(0, 3))):
        block = draw.draw(st.integers(0, len(data) // BLOCK - 1)) * BLOCK
        place = block + draw.draw(
            st.sampled_from([0, 1, 99, 124, 134, 135, 148, 154, 155, 156, 345, 500])
        )
        data[place] = draw.draw(st.sampled_from([0, 32, 45, 46, 47, 48, 49, 55, 56, 76, 95, 200]))
        if draw.draw(st.booleans()):
            mended(data, block)
    whole = bytes(data[: draw.draw(st.sampled_from([len(data), len(data) - 512, 1024]))])
    assert either(whole) == slow(whole)


def test_a_thousand_samples_are_read_without_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [(f"{i:05d}.{e}", i % 700) for i in range(1000) for e in ("jpg", "json")]
    data = bytes(made(members))
    wanted = slow(data)
    assert len(wanted) == 1000
    monkeypatch.setattr(tar, "_index_any", None)
    assert list(index_tar(data, "t")) == wanted


@pytest.mark.parametrize("place", [124, 134, 135, 148, 153, 154, 155, 156, 345, 0, 7, 99, 400])
def test_any_change_of_one_header_among_many_is_seen(place: int) -> None:
    members = [(f"{i:05d}.jpg", 3) for i in range(600)]
    data = made(members)
    data[599 * 2 * BLOCK + place] ^= 0x41
    assert tar._index_plain(bytes(data)) is None
    assert either(bytes(data)) == slow(bytes(data))


@pytest.mark.parametrize("field", [b"00000000_03", b"+0000000003", b" 0000000003", b"0000000003 "])
def test_numbers_that_only_python_reads_are_left_to_the_slow_way(field: bytes) -> None:
    data = made([("a.jpg", 3)])
    data[124:135] = field
    mended(data, 0)
    assert tar._index_plain(bytes(data)) is None
    assert either(bytes(data)) == slow(bytes(data))


def test_negative_sizes_do_not_lead_back() -> None:
    data = made([("a.jpg", 3), ("b.jpg", 3)])
    data[2 * BLOCK + 124 : 2 * BLOCK + 136] = b"-0000002000\0"
    mended(data, 2 * BLOCK)
    assert "is no number" in str(either(bytes(data)))


def test_repeated_and_parted_samples_in_a_later_portion_are_refused() -> None:
    rng = random.Random(0)
    names = [f"{i:05d}.jpg" for i in range(700)]
    for extra in ("00000.jpg", "00003.json", "00699.jpg"):
        data = bytes(made([(name, rng.randrange(9)) for name in [*names, extra]]))
        found = either(data)
        assert isinstance(found, str)
        assert found == slow(data)
