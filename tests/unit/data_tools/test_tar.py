"""The tar index: what it reads, and everything it refuses."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter

from data_tools.tar import BLOCK, index_tar
from dpal.base.errors import DataError


def make_tar(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=8))
def test_every_member_is_found_where_it_lies(contents: list[bytes]) -> None:
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for number, data in enumerate(contents):
            writer.write({"__key__": f"k{number}", "jpg": data, "json": b"{}"})
    data = buffer.getvalue()
    entries = index_tar(data, "t")
    assert [entry.key for entry in entries] == [f"k{i}" for i in range(len(contents))]
    for entry, wanted in zip(entries, contents, strict=True):
        offset, size = entry.members["jpg"]
        assert data[offset : offset + size] == wanted
        assert set(entry.members) == {"jpg", "json"}


def test_key_ends_at_the_first_dot_of_the_last_part() -> None:
    (entry,) = index_tar(make_tar(("a.b/c.seg.png", b"1"), ("a.b/c.jpg", b"2")), "t")
    assert entry.key == "a.b/c"
    assert set(entry.members) == {"seg.png", "jpg"}


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "./a.jpg", "a\\b.jpg"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="not a plain relative name"):
        index_tar(make_tar((name, b"x")), "bad.tar")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
     tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE],
)  # fmt: skip
def test_links_devices_and_extended_headers_are_refused(kind: bytes) -> None:
    with pytest.raises(DataError, match="accepted are regular files"):
        index_tar(make_tar(("a.jpg", b""), kind=kind, link="/etc/passwd"), "bad.tar")


def test_a_member_that_is_there_twice_is_refused() -> None:
    with pytest.raises(DataError, match="twice"):
        index_tar(make_tar(("a.jpg", b"1"), ("a.jpg", b"2")), "bad.tar")


def test_members_of_a_sample_must_be_adjacent() -> None:
    with pytest.raises(DataError, match="not adjacent"):
        index_tar(make_tar(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}")), "bad.tar")


@pytest.mark.parametrize("name", ["nodot", ".jpg", "a."])
def test_names_without_key_or_extension_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"<key>.<extension>"):
        index_tar(make_tar((name, b"x")), "bad.tar")


def test_a_size_that_leaves_the_file_is_refused() -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 10**8
    data = header.tobuf(tarfile.USTAR_FORMAT) + bytes(4 * BLOCK)
    with pytest.raises(DataError, match="larger than what is left"):
        index_tar(data, "bad.tar")


@pytest.mark.parametrize("field", [b"-0000000001\0", b"\x80" + bytes(10) + b"\x01", b"\0" * 12])
def test_a_size_that_is_no_octal_number_is_refused(field: bytes) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(DataError, match="size in the header"):
        index_tar(bytes(header) + bytes(2 * BLOCK), "bad.tar")


@given(st.integers(0, 10_239), st.integers(1, 255))
def test_one_changed_byte_never_gives_anything_but_samples_or_a_data_error(
    position: int, change: int
) -> None:
    data = bytearray(make_tar(("a.jpg", b"x" * 700), ("a.json", b"{}")))
    data[position] ^= change
    try:
        entries = index_tar(bytes(data), "t")
    except DataError:
        return
    for entry in entries:
        for offset, size in entry.members.values():
            assert 0 <= offset <= offset + size <= len(data)


@pytest.mark.parametrize("length", [0, 100, 512, 1000, 1536])
def test_a_truncated_tar_is_refused(length: int) -> None:
    data = make_tar(("a.jpg", b"x" * 900), ("b.jpg", b"y"))
    with pytest.raises(DataError, match=r"truncated|larger than"):
        index_tar(data[:length], "bad.tar")
