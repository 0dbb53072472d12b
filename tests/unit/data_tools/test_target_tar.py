"""Tars of target records: what is read, when it is checked, and that other programs read it."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools import target_tar
from data_tools.target_tar import TargetShard, TargetTarBuilder, offset_of, stride_of
from dpal.base.errors import DataError
from dpal.record import RecordLayout

LAYOUT = RecordLayout("view", "int8", 24, 6)
KEYS = [f"{i:032x}" for i in range(40)]


def made_records(count: int = len(KEYS), layout: RecordLayout = LAYOUT) -> np.ndarray:
    records = np.random.default_rng(count).integers(0, 256, (count, layout.num_bytes), np.uint8)
    for row in records:
        crc = zlib.crc32(row[:-4].tobytes())
        row[-4:] = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)
    return records


def made_tar(records: np.ndarray, keys: list[str] = KEYS, layout: RecordLayout = LAYOUT) -> bytes:
    builder = TargetTarBuilder(keys, layout)
    builder.fill(0, records)
    return builder.to_bytes()


def test_random_rows_are_copied_in_their_order() -> None:
    records = made_records()
    shard = TargetShard(made_tar(records), LAYOUT, "t")
    rows = np.random.default_rng(1).integers(0, len(KEYS), 100).tolist()
    assert shard.keys == tuple(KEYS)
    np.testing.assert_array_equal(shard.records(rows), records[rows])
    out = np.empty((3, LAYOUT.num_bytes), np.uint8)
    assert shard.records([5, 5, 0], out) is out
    np.testing.assert_array_equal(out, records[[5, 5, 0]])


def test_what_was_read_stays_when_the_shard_is_read_again() -> None:
    records = made_records()
    shard = TargetShard(made_tar(records), LAYOUT, "t")
    first = shard.records([1, 2])
    shard.records([3, 4])
    np.testing.assert_array_equal(first, records[[1, 2]])


@pytest.mark.parametrize("place", [0, 100, LAYOUT.crc_start - 1, LAYOUT.num_bytes - 1])
def test_a_damaged_record_is_refused_whenever_it_is_read(place: int) -> None:
    data = bytearray(made_tar(made_records()))
    data[offset_of(7, LAYOUT) + place] ^= 1
    shard = TargetShard(bytes(data), LAYOUT, "bad.tar")
    shard.records([0, 6, 8])
    for _ in range(2):
        with pytest.raises(DataError, match=rf"'bad\.tar'.*{KEYS[7]}.* is damaged"):
            shard.records([6, 7])


def test_a_record_is_checked_once_and_by_whoever_shares_what_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = made_tar(made_records())
    seen: list[int] = []
    crc32 = zlib.crc32
    monkeypatch.setattr(
        target_tar.zlib, "crc32", lambda data: seen.append(len(data)) or crc32(data)
    )
    shard = TargetShard(data, LAYOUT, "t")
    shard.records([3, 3, 4])
    assert seen == [LAYOUT.crc_start] * 2
    again = TargetShard(data, LAYOUT, "t")
    again.trust(shard.checked)
    again.records([3, 4])
    assert len(seen) == 2
    again.records([5])
    shard.records([5])
    assert len(seen) == 3


def test_a_damaged_record_is_never_marked_as_checked() -> None:
    data = bytearray(made_tar(made_records()))
    data[offset_of(2, LAYOUT)] ^= 1
    shard = TargetShard(bytes(data), LAYOUT, "t")
    with pytest.raises(DataError):
        shard.records([2])
    assert not any(shard.checked)


@pytest.mark.parametrize(
    "keys", [KEYS, ["a/b", "c", "ä"], ["x" * 90 + f"/{i}" for i in range(3)], ["one"]]
)
def test_keys_are_the_same_with_and_without_the_headers_checked_together(keys: list[str]) -> None:
    data = made_tar(made_records(len(keys)), keys)
    plain = target_tar._plain_keys(data, LAYOUT)
    assert target_tar._any_keys(data, LAYOUT, "t") == tuple(keys)
    assert plain in (None, tuple(keys))
    assert (plain is not None) == all(
        len(key) < 90 and key.isalnum() and key.isascii() for key in keys
    )
    assert TargetShard(data, LAYOUT, "t").keys == tuple(keys)


def test_any_changed_byte_of_a_header_is_told_as_header_by_header() -> None:
    whole = made_tar(made_records(3), KEYS[:3])
    for place in range(stride_of(LAYOUT), stride_of(LAYOUT) + 512):
        data = bytearray(whole)
        data[place] ^= 0x21
        assert target_tar._plain_keys(bytes(data), LAYOUT) is None
        with pytest.raises(DataError, match=r"bad\.tar"):
            TargetShard(bytes(data), LAYOUT, "bad.tar")


def test_a_key_that_is_there_twice_and_records_of_another_layout_are_refused() -> None:
    records = made_records(2)
    for data, layout in (
        (made_tar(records, ["a", "a"]), LAYOUT),
        (made_tar(records, ["a", "b"]), RecordLayout("view", "int8", 24, 5)),
        (made_tar(records, ["a", "b"]).replace(b".targets", b".targett"), LAYOUT),
        (made_tar(records, ["a", "b"]) + bytes(512), LAYOUT),
        (made_tar(records, ["a", "b"])[:-512], LAYOUT),
    ):
        with pytest.raises(DataError):
            TargetShard(data, layout, "bad.tar")


def test_a_record_lies_where_a_reader_of_ranges_computes_it(tmp_path: Path) -> None:
    records = made_records()
    path = tmp_path / "targets.tar"
    path.write_bytes(made_tar(records))
    with path.open("rb") as file:
        for row in (0, 17, 39):
            file.seek(512 + row * (512 + -(-LAYOUT.num_bytes // 512) * 512))
            assert file.read(LAYOUT.num_bytes) == records[row].tobytes()


def test_stock_webdataset_iterates_the_same_records(tmp_path: Path) -> None:
    records = made_records()
    path = tmp_path / "targets.tar"
    path.write_bytes(made_tar(records))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == KEYS
    assert [sample["targets"] for sample in samples] == [row.tobytes() for row in records]


def test_the_standard_library_reads_the_same_records() -> None:
    records = made_records()
    with tarfile.open(fileobj=io.BytesIO(made_tar(records))) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert found == [
        (f"{key}.targets", row.tobytes()) for key, row in zip(KEYS, records, strict=True)
    ]
