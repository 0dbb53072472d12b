"""Tars that mean harm, each built by hand: refused in one sentence, or skipped as documented.

Nothing is written beside the folder of local copies, nothing is executed, and memory stays flat.
"""

import hashlib
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import tar
from data_tools.local_cache import LocalCache
from data_tools.manifest import MANIFEST, Manifest, ShardRef, keys_digest, load_manifest
from data_tools.shard import read_shard
from data_tools.storage import LocalStore, open_store
from data_tools.tar import BLOCK, index_tar
from data_tools.target_tar import TargetShard, TargetTarBuilder
from dpal.base.errors import DataError
from dpal.base.inputs import Storage
from dpal.record import RecordLayout

END = bytes(2 * BLOCK)
USTAR = b"ustar\x0000"


def head(
    name: bytes,
    size: int | bytes,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    magic: bytes = USTAR,
    prefix: bytes = b"",
) -> bytes:
    """One header block with a right checksum (POSIX.1-1988); `size` as bytes goes in as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8ss100s8s32s32s8s8s155s12x",
            *(name, b"0000644\0", b"0000000\0", b"0000000\0", field, b"00000000000\0"),
            *(b" " * 8, kind, link, magic, b"", b"", b"", b"", prefix),
        )
    )
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes = b"x", kind: bytes = b"0", **options: bytes) -> bytes:
    return head(name, len(data), kind, **options) + data + bytes(-len(data) % BLOCK)


def pax(record: bytes) -> bytes:
    line = b" " + record + b"\n"
    length = len(line) + len(str(len(line) + 2))
    return member(b"./PaxHeaders/a.jpg", str(length).encode() + line, b"x")


SAMPLE = member(b"a.jpg", b"image") + member(b"a.json", b"{}")
REFUSED: dict[str, tuple[bytes, str]] = {
    "absolute name": (member(b"/etc/cron.d/a.jpg"), "plain relative name"),
    "climbing name": (member(b"../../a.jpg"), "plain relative name"),
    "climbing inside": (member(b"x/../../a.jpg"), "plain relative name"),
    "climbing prefix": (member(b"a.jpg", prefix=b"../.."), "plain relative name"),
    "absolute prefix": (member(b"a.jpg", prefix=b"/etc"), "plain relative name"),
    "current folder": (member(b"./a.jpg"), "plain relative name"),
    "doubled slash": (member(b"x//a.jpg"), "plain relative name"),
    "backslash": (member(b"..\\..\\a.jpg"), "plain relative name"),
    "drive and backslash": (member(b"C:\\a.jpg"), "plain relative name"),
    "bytes behind a NUL": (member(b"a.jpg\0.sh"), "is no text"),
    "line end in a name": (member(b"a\nb.jpg"), "is no text"),
    "escape in a name": (member(b"\x1b[2Ja.jpg"), "is no text"),
    "not UTF-8": (member(b"\xff\xfe.jpg"), "is no text"),
    "prefix not UTF-8": (member(b"a.jpg", prefix=b"\xff"), "is no text"),
    "empty name": (member(b""), "<key>.<extension>"),
    "hidden name": (member(b".jpg"), "<key>.<extension>"),
    "hard link": (member(b"a.jpg", b"", b"1", link=b"/etc/passwd"), "accepted are regular files"),
    "symbolic link": (member(b"a.jpg", b"", b"2", link=b"../../x"), "accepted are regular files"),
    "character device": (member(b"a.jpg", b"", b"3"), "accepted are regular files"),
    "block device": (member(b"a.jpg", b"", b"4"), "accepted are regular files"),
    "folder": (member(b"a.jpg", b"", b"5"), "accepted are regular files"),
    "pipe": (member(b"a.jpg", b"", b"6"), "accepted are regular files"),
    "contiguous file": (member(b"a.jpg", b"x", b"7"), "accepted are regular files"),
    "GNU sparse bomb": (head(b"a.jpg", 0, b"S"), "accepted are regular files"),
    "PAX sparse bomb": (pax(b"GNU.sparse.realsize=1099511627776"), "accepted are regular files"),
    "PAX size": (pax(b"size=1099511627776"), "accepted are regular files"),
    "PAX global": (member(b"g", b"30 path=/etc/passwd\n", b"g"), "accepted are regular files"),
    "GNU long name": (member(b"././@LongLink", b"y" * 5000, b"L"), "accepted are regular files"),
    "GNU long link": (member(b"././@LongLink", b"y" * 500, b"K"), "accepted are regular files"),
    "vendor type": (member(b"a.jpg", b"x", b"\xf0"), "accepted are regular files"),
    "header of 10 GB": (head(b"a.jpg", b"%012o" % (10 * 2**30)), "bytes, accepted are"),
    "largest octal": (head(b"a.jpg", b"777777777777"), "bytes, accepted are"),
    "past the end": (head(b"a.jpg", 100_000), "larger than what is left"),
    "base-256 size": (head(b"a.jpg", b"\x80" + bytes(3) + struct.pack(">Q", 2**40)), "no number"),
    "negative base-256": (head(b"a.jpg", b"\xff" * 12), "no number"),
    "negative octal": (head(b"a.jpg", b"-0000000001\0"), "no number"),
    "not octal": (head(b"a.jpg", b"00000000009\0"), "no number"),
    "underscores": (head(b"a.jpg", b"0000_0001_0\0"), "no number"),
    "size missing": (head(b"a.jpg", bytes(12)), "no number"),
    "NUL inside a size": (head(b"a.jpg", b"1\x00000000010\0"), "no number"),
    "duplicate member": (SAMPLE + member(b"a.jpg", b"other"), "twice"),
    "duplicate key": (SAMPLE + member(b"b.jpg") + SAMPLE, "not adjacent"),
    "keys not adjacent": (SAMPLE + member(b"b.jpg") + member(b"a.txt"), "not adjacent"),
    "garbage after the end": (SAMPLE + END + member(b"z.jpg", b"z"), "bytes after its end"),
    "one byte after the end": (SAMPLE + END + b"\1", "bytes after its end"),
    "a long tail of zeros": (SAMPLE + END + bytes(2 * tar.MAX_TAIL_BYTES), "bytes after its end"),
    "one end block": (SAMPLE + bytes(BLOCK), "truncated"),
    "nothing": (b"", "truncated"),
    "no tar": (b"PK\x03\x04" * 500, "no number"),
    "a wrong checksum": (b"b" + SAMPLE[1:], "is damaged"),
}


def harmful(case: str) -> bytes:
    """The tar of a case; those that are about the end have their own."""
    data, words = REFUSED[case]
    return data if words in ("truncated", "bytes after its end") else data + END


@pytest.mark.parametrize("case", REFUSED)
def test_harmful_tars_are_refused_in_one_sentence(case: str) -> None:
    words = REFUSED[case][1]
    with pytest.raises(DataError) as caught:
        index_tar(harmful(case), "bad.tar")
    message = str(caught.value)
    assert words in message
    assert "'bad.tar'" in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 400


def test_a_tar_is_refused_when_truncated_at_any_block() -> None:
    whole = SAMPLE + member(b"b.jpg", bytes(900)) + END
    assert len(index_tar(whole, "t")) == 2
    for length in range(0, len(whole), BLOCK):
        with pytest.raises(DataError, match=r"truncated|larger than"):
            index_tar(whole[:length], "bad.tar")


def test_names_of_up_to_255_bytes_are_read_and_members_may_be_empty() -> None:
    long = member(b"n" * 96 + b".jpg", b"", prefix=b"f" * 150)
    (entry,) = index_tar(long + END, "t")
    assert entry.key == "f" * 150 + "/" + "n" * 96
    assert entry.members["jpg"].size == 0


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("MAX_MEMBER_BYTES", 4, "has 5 bytes, accepted are 4"),
        ("MAX_MEMBERS", 1, "more members than the 1"),
        ("MAX_SHARD_BYTES", 100, "accepted are 100"),
    ],
)
def test_limits_are_kept(
    limit: str, value: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, limit, value)
    with pytest.raises(DataError, match=words):
        index_tar(SAMPLE + END, "bad.tar")


def test_headers_that_announce_much_take_no_memory() -> None:
    announced = [head(b"a.jpg", b"%011o\0" % size) + END for size in (2**29, 2**32, 2**33 - 1)]
    tracemalloc.start()
    for data in announced:
        with pytest.raises(DataError):
            index_tar(data, "bad.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def reference(data: bytes, keys: tuple[str, ...], name: str = "persons-000000.tar") -> ShardRef:
    digest = hashlib.sha256(data).hexdigest()
    return ShardRef(name, digest, len(data), len(keys), keys_digest(keys))


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_written_outside_of_the_local_copies(case: str, tmp_path: Path) -> None:
    """Even when the manifest vouches for the tar, as a hostile one would."""
    data = harmful(case)
    around = tmp_path / "around"
    (around / "inner").mkdir(parents=True)
    (around / "bystander").write_bytes(b"1")
    store = open_store(f"memory://{tmp_path.name}-{abs(hash(case))}", Storage())
    store.put("persons-000000.tar", data)
    before, home = _tree(around), os.getcwd()
    os.chdir(around / "inner")
    try:
        with pytest.raises(DataError):
            read_shard(store, reference(data, ("a",)), LocalCache(around / "copies", 10**8))
    finally:
        os.chdir(home)
    after = _tree(around)
    copies = {name for name in after if name.partition("/")[0] == "copies"}
    assert {name: after[name] for name in after.keys() - copies} == before
    named = f"copies/{hashlib.sha256(data).hexdigest()}.tar"
    files = {name for name in copies if after[name] is not None and "/locks/" not in name}
    assert files <= {named}


def test_pickled_members_are_never_opened(tmp_path: Path) -> None:
    """A shard may hold any extension; only the image and the JSON are ever read."""
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return (os.mkdir, (str(mark),))

    bomb = pickle.dumps(Bomb())
    names = [b"a.pkl", b"a.pyd", b"a.pt", b"a.pth", b"a.npy", b"a.npz", b"a.pickle"]
    data = SAMPLE + b"".join(member(name, bomb) for name in names) + END
    store = LocalStore(tmp_path / "store")
    store.put("persons-000000.tar", data)
    shard = read_shard(store, reference(data, ("a",)), None)
    assert shard.image_bytes(0) == b"image"
    assert shard.meta(0) == {}
    assert not mark.exists()
    pickle.loads(bomb)  # the bomb is live: opened, it would have done it
    assert mark.exists()


def test_a_sample_without_an_image_or_with_two_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for extra in (b"", member(b"a.jpg") + member(b"a.png")):
        data = extra + member(b"a.json", b"{}") + END
        store.put("persons-000000.tar", data)
        with pytest.raises(DataError, match="exactly one image"):
            read_shard(store, reference(data, ("a",)), None)


@pytest.mark.parametrize(
    "name",
    [
        *("../persons-000000.tar", "/etc/passwd", "x/../y.tar", "x/y.tar", "..tar", "a.tar/b"),
        *("pipe:cat x.tar", "pipe:id>.tar", "file:///etc/passwd.tar", "s3://b/a.tar", "a\\b.tar"),
        *("a b.tar", "", "a.pkl", "-rf.tar", "a.tar\0"),
    ],
)
def test_manifests_whose_names_leave_the_folder_are_damaged(name: str, tmp_path: Path) -> None:
    data = SAMPLE + END
    text = Manifest((reference(data, ("a",), name),)).to_json()
    store = LocalStore(tmp_path)
    store.put(MANIFEST, text.encode())
    with pytest.raises(DataError, match="is damaged"):
        load_manifest(store)


def test_a_pipe_is_no_url_but_a_folder_that_is_not_there(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(DataError, match=r"no manifest\.json"):
            load_manifest(open_store(f"pipe:touch {mark}", Storage()))
    finally:
        os.chdir(home)
    assert not mark.exists()


LAYOUT = RecordLayout("view", "fp32", 4, 2)


def targets() -> bytes:
    builder = TargetTarBuilder(["a", "b"], LAYOUT)
    builder.fill(0, np.zeros((2, LAYOUT.num_bytes), np.uint8))
    return builder.to_bytes()


@pytest.mark.parametrize("case", REFUSED)
def test_targets_refuse_the_same_tars(case: str) -> None:
    with pytest.raises(DataError) as caught:
        TargetShard(harmful(case), LAYOUT, "bad.tar")
    assert "\n" not in str(caught.value)


def test_targets_refuse_records_of_other_sizes_names_and_numbers() -> None:
    whole = targets()
    assert TargetShard(whole, LAYOUT, "t").keys == ("a", "b")
    record = bytes(LAYOUT.num_bytes)
    for data in (
        member(b"a.targets", record + b"1") + END,
        member(b"a.pkl", record) + END,
        member(b"a.targets", record) + member(b"a.pkl", record) + END,
        whole + bytes(BLOCK),
        SAMPLE + END,
    ):
        with pytest.raises(DataError, match=r"bad\.tar"):
            TargetShard(data, LAYOUT, "bad.tar")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_headers_give_samples_inside_the_tar_or_a_data_error(draw: st.DataObject) -> None:
    """Checksums are made right again, so that every field is reached."""
    targeted = draw.draw(st.booleans())
    data = bytearray(targets() if targeted else SAMPLE + member(b"b.jpg", bytes(600)) + END)
    offset = draw.draw(st.sampled_from([0, 2 * BLOCK] if targeted else [0, 1024, 2048]))
    for _ in range(draw.draw(st.integers(1, 8))):
        data[offset + draw.draw(st.integers(0, BLOCK - 1))] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        data[offset + 148 : offset + 156] = b" " * 8
        total = sum(data[offset : offset + BLOCK])
        data[offset + 148 : offset + 156] = b"%06o\0 " % total
    try:
        entries = index_tar(bytes(data), "t")
        TargetShard(bytes(data), LAYOUT, "t")
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - whichever is raised
        return
    for entry in entries:
        json.dumps(entry.key)
        for start, size in entry.members.values():
            assert 0 <= start <= start + size <= len(data)
