"""LMDB environments and tars of others: pictures, facts, and nothing that could do harm."""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources.tars import TarSource
from dpal.base.errors import ConfigError, DataError

from made_sources import items_of, jpeg, opened, write_lmdb, write_tar

ONE = jpeg(1)
LONG = "a-long-folder-name/" * 12 + "k.jpg"


def header(name: bytes, size: bytes, kind: bytes = b"0", at_482: bytes = b"\0") -> bytes:
    """A ustar header block written by hand."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[482:483] = at_482
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(contents: bytes) -> bytes:
    return contents + bytes(-len(contents) % 512)


def octal(number: int) -> bytes:
    return b"%011o" % number


def test_pictures_of_a_webdataset_tar_come_with_what_is_beside_them(tmp_path: Path) -> None:
    members = {
        "x/b.jpg": jpeg(1),
        "x/b.json": json.dumps({"identity": "7", "boxes": [[0, 0, 5, 5]]}).encode(),
        "x/b.txt": b" someone in a red coat\n",
        "a.cls": b"13",
        "a.png": jpeg(2),
        "a.seg.png": b"a mask, no picture",
        "c.0.jpeg": b"an unknown ending",
        "d.JPG": jpeg(3),
    }
    tar = write_tar(tmp_path / "0.tar", members)
    items = items_of(tar)
    assert {item.name: item.facts for item in items} == {
        "a.png": {"class": 13},
        "d.JPG": {},
        "x/b.jpg": {
            "identity": "7",
            "boxes": [[0, 0, 5, 5]],
            "caption": "someone in a red coat",
        },
    }
    source = opened(tar)
    assert {item.name: source.read(item.picture) for item in items} == {
        item.name: members[item.name] for item in items
    }
    assert all(item.size == len(members[item.name]) for item in items)


@pytest.mark.parametrize(
    "tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
)
def test_long_names_of_all_formats_are_read(tmp_path: Path, tar_format: int) -> None:
    names = ["k.jpg", "a/" * 60 + "k.jpg"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += [LONG, "ü" * 80 + ".jpg"]
    tar = write_tar(tmp_path / "t.tar", dict.fromkeys(names, ONE), tar_format)
    assert [item.name for item in items_of(tar)] == sorted(names)


def test_a_folder_of_tars_is_sorted_across_them(tmp_path: Path) -> None:
    for name in ("b.tar", "b/c.tar", "b-1.tar", "a.tar"):
        write_tar(tmp_path / name, {"2.jpg": jpeg(2), "1.jpg": ONE})
    (tmp_path / "index.json").write_text("{}")
    items = items_of(tmp_path)
    assert len(items) == 8
    assert items[0].name == "a.tar/1.jpg"
    source = opened(tmp_path)
    assert isinstance(source, TarSource)
    assert {source.read(item.picture) for item in items} == {ONE, jpeg(2)}


def test_a_folder_with_pictures_and_a_tar_is_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", {"1.jpg": ONE})
    (tmp_path / "x.jpg").write_bytes(ONE)
    assert [item.name for item in items_of(tmp_path)] == ["t.tar", "x.jpg"]


def test_what_is_no_plain_file_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in [
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.CHRTYPE, "device.jpg"),
            (tarfile.FIFOTYPE, "pipe.jpg"),
            (tarfile.DIRTYPE, "folder.jpg"),
        ]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        for name in (
            "../up.jpg",
            "/abs.jpg",
            "a/../../b.jpg",
            "./ok.jpg",
            "again.jpg",
            "again.jpg",
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(ONE)
            tar.addfile(entry, io.BytesIO(ONE))
        entry = tarfile.TarInfo("ok.txt")
        entry.size = 2**20 + 1
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    before = sorted(tmp_path.rglob("*"))
    source = opened(path)
    assert [(item.name, item.facts) for item in source.items()] == [
        ("again.jpg", {}),
        ("ok.jpg", {}),
    ]
    assert source.left_out == {  # type: ignore[attr-defined]
        "link": 2,
        "device": 2,
        "name that is no relative path": 3,
        "name that is there twice": 1,
        "text of more than 1048576 bytes": 1,
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_sparse_files_are_passed_over_with_their_maps(tmp_path: Path) -> None:
    data = bytes(1000)
    old = header(b"old.jpg", octal(1000), b"S", b"\1") + bytes(504) + b"\1" + bytes(7) + bytes(512)
    records = b"".join(
        b"%d %s" % (len(record) + 3, record)
        for record in (b"GNU.sparse.major=1\n", b"GNU.sparse.name=new.jpg\n")
    )
    new = header(b"pax", octal(len(records)), b"x") + padded(records)
    new += header(b"GNUSparseFile.0/new.jpg", octal(1000)) + padded(data)
    plain = header(b"plain.jpg", octal(len(ONE))) + padded(ONE)
    (tmp_path / "t.tar").write_bytes(old + padded(data) + new + plain + bytes(1024))
    source = opened(tmp_path / "t.tar")
    assert [item.name for item in source.items()] == ["plain.jpg"]
    assert source.left_out == {"sparse file": 2}  # type: ignore[attr-defined]


def test_sizes_in_binary_and_in_pax_records_are_read(tmp_path: Path) -> None:
    binary = b"\x80" + len(ONE).to_bytes(11, "big")
    record = b"size=%d\n" % len(ONE)
    record = b"%d %s" % (len(record) + 3, record)
    pax = header(b"pax", octal(len(record)), b"x") + padded(record)
    tar = header(b"a.jpg", binary) + padded(ONE) + pax + header(b"b.jpg", octal(0)) + padded(ONE)
    (tmp_path / "t.tar").write_bytes(tar + bytes(1024))
    items = items_of(tmp_path / "t.tar")
    assert [(item.name, item.size) for item in items] == [("a.jpg", len(ONE)), ("b.jpg", len(ONE))]


def pax(record: bytes) -> bytes:
    """A pax header of one record, and an empty member that it tells of."""
    record = b"%d%s\n" % (len(record) + 5, record)
    return header(b"x", octal(len(record)), b"x") + padded(record) + header(b"a.jpg", octal(0))


HUGE = b"\x80" + (10 * 2**30).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"", "is truncated: it has no end-of-archive block"),
        (header(b"a.jpg", octal(3)) + padded(b"abc"), "is truncated"),
        (header(b"a.jpg", octal(600)) + bytes(512), "larger than what is left"),
        (header(b"a.jpg", HUGE) + bytes(1024), "larger than what is left"),
        (header(b"x", HUGE, b"x") + bytes(1024), "larger than what is left"),
        (header(b"x", octal(2**20 + 1), b"L") + bytes(2**21), "accepted are 1048576"),
        (header(b"x", octal(5), b"x") + padded(b"99 a=") + bytes(512), "pax header .* is damaged"),
        (header(b"x", octal(4), b"x") + padded(b"4 ab") + bytes(512), "pax header .* is damaged"),
        (pax(b" size=" + b"1" * 5000), "the size before byte .* is no number"),
        (header(b"x", octal(5000), b"x") + padded(b"1" * 5000), "pax header .* is damaged"),
        (b"\x1f\x8b" + bytes(2000), "is damaged, or this is no tar"),
        (bytes(1024), "has no picture"),
        (header(b"a.jpg", b"-0000000001") + bytes(1024), "is damaged"),
    ],
)
def test_a_damaged_tar_is_told_by_its_name(tmp_path: Path, contents: bytes, sentence: str) -> None:
    (tmp_path / "t.tar").write_bytes(contents)
    with pytest.raises(DataError, match=rf"t\.tar'.*{sentence}"):
        items_of(tmp_path / "t.tar")


@pytest.mark.parametrize("text", [b"{", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000])
def test_a_damaged_text_beside_a_picture_is_told_by_its_name(tmp_path: Path, text: bytes) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": ONE, "a.json": text})
    with pytest.raises(DataError, match=r"t\.tar': member 'a\.json' cannot be understood"):
        items_of(tar)


@pytest.mark.parametrize(
    "told",
    [
        *({"boxes": "none"}, {"boxes": [[1, 2, 3]]}, {"boxes": [["1", 2, 3, 4]]}, {"boxes": None}),
        *({"boxes": [[0, 0, 10**400, 9]]}, {"keypoints": [[[10**400, 1, 1]]]}),
        *({"keypoints": [[1, 2, 3]]}, {"keypoints": {"a": 1}}, {"keypoints": [[[True, 1, 1]]]}),
        *(
            {"masks": [[[1, 2, 3]]]},
            {"masks": [{"counts": 3}]},
            {"head_boxes": [7]},
            {"persons": 3},
        ),
    ],
    ids=str,
)
def test_places_that_cannot_be_understood_are_told(tmp_path: Path, told: dict[str, Any]) -> None:
    contents = json.dumps(told).encode()
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": ONE, "a.json": contents})
    with pytest.raises(DataError, match=rf"t\.tar', beside 'a': {min(told)} "):
        items_of(tar)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_of_headers_end_in_items_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    members = {"a.jpg": ONE[:300], "a.json": b"{}", LONG: ONE[:300]}
    contents = bytearray(write_tar(folder / "t.tar", members).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    (folder / "t.tar").write_bytes(contents)
    source = opened(folder / "t.tar")
    with contextlib.suppress(DataError):
        for item in source.items():
            assert len(source.read(item.picture)) == item.size


@pytest.mark.parametrize("asked", ["a.jpg", "t.tar@x+3", "t.tar@3", "@3+4", "t.tar@-3+4"])
def test_a_picture_that_is_no_place_in_a_tar_is_refused(tmp_path: Path, asked: str) -> None:
    source = opened(write_tar(tmp_path / "t.tar", {"a.jpg": ONE}))
    with pytest.raises(DataError, match="has no picture"):
        source.read(asked)
    with pytest.raises(DataError, match="ends before byte"):
        source.read("t.tar@99999999+4")
    with pytest.raises(DataError, match="not a plain relative name"):
        source.read("../t.tar@0+4")


def test_an_lmdb_environment_gives_its_values_with_video_and_identity(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    values = {
        b"02_01_0003_00000004": jpeg(1),
        b"00_00_0000_00000000": jpeg(2),
        b"00017_23_101_4": jpeg(3),
        b"plain": jpeg(4) * 20,
        b"__len__": pickle.dumps(4),
    }
    folder = write_lmdb(tmp_path / "lmdb", values)
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(["never read"]))
    items = items_of(folder)
    assert {item.name: item.facts for item in items} == {
        "02_01_0003_00000004": {"video": "02_01_0003"},
        "00_00_0000_00000000": {"video": "00_00_0000"},
        "00017_23_101_4": {"video": "00017", "identity": "23"},
        "plain": {},
    }
    source = opened(folder / "data.mdb")
    for item in items:
        assert source.read(item.picture) == values[item.name.encode()]
        assert item.size == len(values[item.name.encode()])
    with pytest.raises(DataError, match="has no key 'nobody'"):
        source.read("nobody")


@pytest.mark.parametrize("kind", ["tars", "lmdb"])
def test_many_threads_read_while_items_are_listed(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("lmdb")
    values = {f"{number:03}": jpeg(number, (8, 8)) for number in range(120)}
    if kind == "lmdb":
        write_lmdb(tmp_path / kind, {name.encode(): value for name, value in values.items()})
    for tar in range(5 * (kind == "tars")):
        members = {f"{name}.jpg": values[name] for name in values if int(name) % 5 == tar}
        write_tar(tmp_path / kind / f"{tar}.tar", members)
    source = opened(tmp_path / kind)
    with ThreadPoolExecutor(8) as pool:
        asked = [(item, pool.submit(source.read, item.picture)) for item in source.items()]
        read = {item.name[-7:].removesuffix(".jpg")[-3:]: one.result() for item, one in asked}
    assert read == values


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_value_is_refused_by_its_key_and_never_opened(
    tmp_path: Path, protocol: int
) -> None:
    pytest.importorskip("lmdb")

    class Harm:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    values = {b"a": ONE, b"b": pickle.dumps(Harm(), protocol)}
    with pytest.raises(DataError, match="the value of key 'b' is a pickle, which is never opened"):
        items_of(write_lmdb(tmp_path / "lmdb", values))
    assert not (tmp_path / "harm").exists()


def test_a_damaged_or_truncated_environment_is_told(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    folder = write_lmdb(tmp_path / "lmdb", {b"%d" % k: ONE * 9 for k in range(9)})
    whole = (folder / "data.mdb").read_bytes()
    for kept in (0, 100, 4096, 2 * 4096, 5 * 4096, len(whole) - 1):
        (folder / "data.mdb").write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"data\.mdb' is (truncated|no LMDB environment)"):
            items_of(folder)
    (folder / "data.mdb").write_bytes(b"no environment " * 1000)
    with pytest.raises(DataError, match=r"data\.mdb' is no LMDB environment"):
        items_of(folder)


def test_a_page_that_is_none_is_told_when_it_is_read(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    folder = write_lmdb(tmp_path / "lmdb", {b"%d" % k: ONE * 9 for k in range(900)})
    whole = bytearray((folder / "data.mdb").read_bytes())
    leaves = [at for at in range(8192, len(whole), 4096) if whole[at + 10 : at + 12] == b"\x02\0"]
    assert len(leaves) > 2
    for at in leaves:
        whole[at + 8 : at + 16] = bytes(8)
    (folder / "data.mdb").write_bytes(whole)
    source = opened(folder)
    with pytest.raises(DataError, match=r"data\.mdb' is damaged: "):
        list(source.items())
    with pytest.raises(DataError, match=r"data\.mdb' is damaged: "):
        source.read("7")


def test_without_the_package_an_environment_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    (tmp_path / "data.mdb").write_bytes(struct.pack("<4I", 0, 0, 0, 0))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ConfigError, match=r"data\.mdb.*pip install 'dpal\[sources\]'"):
        items_of(tmp_path)
