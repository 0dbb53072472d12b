"""`dpal shard` on every kind of source: facts arrive in the shards; refusals are told."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from command import call
from made_sources import coco, gtbox, jpeg, odgt, write_lmdb, write_pictures, write_tar

Capture = pytest.CaptureFixture[str]
SMALL = ["--set", "min_side=4"]


def shard(
    capsys: Capture, tmp_path: Path, source: Path, *options: str
) -> dict[str, dict[str, Any]]:
    """What the samples' JSON says, by the source's name of the sample."""
    destination = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    answer = call(capsys, "shard", *SMALL, *options, source, destination)
    assert answer.code == 0, answer.printed
    told = {}
    for path in sorted(destination.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    meta = json.loads(file.read())
                    told[meta["source"]] = meta
    return told


def test_persons_of_coco_are_cut_out_and_their_keypoints_move(
    capsys: Capture, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "in", "a.jpg", "b.jpg")
    (tmp_path / "in" / "persons.json").write_text(json.dumps(coco()))
    told = shard(capsys, tmp_path, tmp_path / "in" / "persons.json", "--set", "margin=0")
    assert sorted(told) == ["a.jpg#0", "a.jpg#1"]
    first = told["a.jpg#0"]
    assert (first["width"], first["height"]) == (10, 20)
    assert first["boxes"] == [[0, 0, 10, 20]]
    assert first["keypoints"][0][:2] == [[-1, -1, 2], [2, 2, 5]]
    assert first["masks"] == [[[0, 0, 10, 0, 10, 20.5]]]


def test_crowdhuman_pictures_are_whole_scenes(capsys: Capture, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "1.jpg", "2.jpg")
    (tmp_path / "in" / "val.odgt").write_text(odgt("1", gtbox(2), gtbox(9)) + odgt("2"))
    source = tmp_path / "in" / "val.odgt"
    told = shard(capsys, tmp_path, source, "--set", "persons=scenes")
    assert told["1.jpg"]["boxes"] == [[2, 0, 12, 18], [9, 0, 19, 18]]
    assert told["2.jpg"]["boxes"] == []
    assert (told["1.jpg"]["width"], told["1.jpg"]["height"]) == (24, 40)


def test_tables_names_tars_and_lmdb_tell_who_is_on_a_picture(
    capsys: Capture, tmp_path: Path
) -> None:
    pytest.importorskip("lmdb")
    write_pictures(tmp_path / "in", "a.jpg", "b.jpg")
    (tmp_path / "in" / "t.csv").write_text("file,identity\na.jpg,p1\nb.jpg,p2\n")
    told = shard(capsys, tmp_path, tmp_path / "in" / "t.csv")
    assert {name: meta["identity"] for name, meta in told.items()} == {"a.jpg": "p1", "b.jpg": "p2"}

    write_pictures(tmp_path / "named", "0002_c1s1_000451_03.jpg", "-1_c1s1_000401_03.jpg")
    told = shard(capsys, tmp_path, tmp_path / "named", "--set", "names=market1501")
    assert {(meta["identity"], meta["camera"]) for meta in told.values()} == {("0002", "1")}

    tar = write_tar(tmp_path / "t.tar", {"k.jpg": jpeg(5), "k.json": b'{"identity": "p7"}'})
    assert shard(capsys, tmp_path, tar)["k.jpg"]["identity"] == "p7"

    folder = write_lmdb(tmp_path / "lmdb", {b"02_01_0003_00000004": jpeg(7)})
    assert shard(capsys, tmp_path, folder)["02_01_0003_00000004"]["video"] == "02_01_0003"


def test_shards_can_be_sharded_again(capsys: Capture, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", "a.jpg", "b.jpg")
    (tmp_path / "in" / "t.csv").write_text("file,identity\na.jpg,p1\nb.jpg,p2\n")
    shard(capsys, tmp_path, tmp_path / "in" / "t.csv")
    told = shard(capsys, tmp_path, tmp_path / "out-0")
    assert {meta["identity"] for meta in told.values()} == {"p1", "p2"}


@pytest.mark.parametrize(
    ("source", "contents", "options", "code", "sentence"),
    [
        ("in.zip", b"PK", [], 2, "a file of no known kind: accepted are folders"),
        ("c.json", b"{", [], 3, "no COCO instances file"),
        ("t.csv", b"name\n", [], 3, "accepted are file,left,top,right,bottom"),
        ("v.odgt", b"{}\n", [], 3, "v.odgt:1 is no picture of a CrowdHuman .odgt"),
        ("t.tar", b"", [], 3, "is truncated"),
        ("data.mdb", b"x", [], 3, "no LMDB environment"),
        ("t.csv", b"file\n", ["--set", "names=market1501"], 2, "data.names=market1501"),
        ("t.csv", b"file\n", [], 3, "t.csv' is empty"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(
    capsys: Capture,
    tmp_path: Path,
    source: str,
    contents: bytes,
    options: list[str],
    code: int,
    sentence: str,
) -> None:
    (tmp_path / source).write_bytes(contents)
    answer = call(capsys, "shard", *options, tmp_path / source, tmp_path / "out")
    assert answer.code == code, answer.printed
    assert sentence in answer.sentence
    assert not (tmp_path / "out").exists()
