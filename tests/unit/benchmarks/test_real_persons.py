"""Unpacking real person sets, on made archives in the published layout."""

import csv
import io
import json
import runpy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dpal.base.errors import DataError

PAIR = ([1, 2, 3.5, 4], [4, 5, 6, 7])
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "real_persons.py"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def jpeg(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 16), (colour, 90, 90)).save(stream, "JPEG")
    return stream.getvalue()


def palette(values: list[int]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.array([values] * 16, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path, members: dict[str, bytes], labels: str = "") -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if labels:
        (folder / "labels.csv").write_text(labels)


@pytest.fixture
def data(tmp_path: Path, script: SimpleNamespace) -> Path:
    data = tmp_path / "shared" / "data"
    names = [name for group in script.PARTS.values() for name in group]
    shirt, boots = names.index("shirt"), names.index("boots")
    write_set(
        data / "cuhk03_labeled",
        {"train/0_0.jpg": jpeg(1), "val/0_0.jpg": jpeg(2), "val/0_1.jpg": jpeg(3)},
        "file,split,pid,cam\ntrain/0_0.jpg,train,1,0\nval/0_0.jpg,val,9,0\nval/0_1.jpg,val,9,1\n",
    )
    write_set(
        data / "ccp",
        {f"photos/{i}.jpg": jpeg(20 + i) for i in range(6)}
        | {f"masks/{i}.png": palette([0, 0, shirt, boots]) for i in range(4)},
        "file,has_mask\n" + "".join(f"photos/{i}.jpg,{int(i < 4)}\n" for i in range(6)),
    )
    (data / "ccp" / "classes.json").write_text(json.dumps(names))
    write_set(data / "lsp_extended", {"00001.jpg": jpeg(4)})
    write_set(data / "inria_person_crops", {"crop1.jpg": jpeg(5)})
    write_set(data / "coco128_seg", {f"{i}.jpg": jpeg(40 + i) for i in range(4)})
    scenes = [
        {"file": "0.jpg", "persons": [], "raw_yolo": "45 .1 .1\n49 .1 .1"},
        {"file": "1.jpg", "persons": [{"box": [1, 2, 3, 4]}], "raw_yolo": "0 .1 .1"},
        {"file": "2.jpg", "persons": [], "raw_yolo": "45 .1 .1\n0 .1 .1"},
        {"file": "3.jpg", "persons": [{"box": b} for b in PAIR], "raw_yolo": "0 .1 .1\n0 .1 .1"},
    ]
    (data / "coco128_seg" / "annotations.json").write_text(json.dumps(scenes))
    write_set(data / "penn_fudan", {f"images/Fudan{i}.jpg": jpeg(60 + i) for i in range(2)})
    penn = [{"file": f"images/Fudan{i}.jpg", "boxes": [[0, 1, 2, 3]] * i} for i in range(2)]
    (data / "penn_fudan" / "annotations.json").write_text(json.dumps(penn))
    for name in script.TEACHERS:
        (data.parent / "weights").mkdir(exist_ok=True)
        (data.parent / "weights" / name).write_bytes(b"weights")
    return data


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jpg"))


def test_folders_hold_the_right_halves(script, data, tmp_path):
    out = tmp_path / "real"
    counts = script.unpack(data, out)
    assert counts == {
        "persons": 5,
        "backgrounds": 1,
        "scenes": 3,
        "reid": 2,
        "parsing": 4,
        "weights": len(script.TEACHERS),
    }
    assert names_in(out / "persons") == [
        "ccp-4.jpg", "ccp-5.jpg", "cuhk03-0_0.jpg", "inria-crop1.jpg", "lsp-00001.jpg",
    ]  # fmt: skip
    assert names_in(out / "backgrounds") == ["coco-0.jpg"]
    assert names_in(out / "scenes") == ["coco-3.jpg", "penn-Fudan0.jpg", "penn-Fudan1.jpg"]
    with (out / "scenes" / "boxes.csv").open() as stream:
        assert list(csv.reader(stream)) == [
            ["file", "left", "top", "right", "bottom"],
            ["penn-Fudan1.jpg", "0", "1", "2", "3"],
            ["coco-3.jpg", "1", "2", "3.5", "4"],
            ["coco-3.jpg", "4", "5", "6", "7"],
        ]
    with (out / "reid" / "labels.csv").open() as stream:
        assert list(csv.reader(stream))[1:] == [["0_0.jpg", "9", "0"], ["0_1.jpg", "9", "1"]]
    with (out / "parsing" / "labels.csv").open() as stream:
        assert [row["split"] for row in csv.DictReader(stream)] == ["train"] * 3 + ["test"]
    merged = np.unique(np.asarray(Image.open(out / "parsing" / "0.png")))
    parts = json.loads((out / "parsing" / "classes.json").read_text())
    assert [parts[index] for index in merged] == ["background", "upper clothes", "shoes"]
    assert (out / ".gitignore").read_text() == "*\n"


def test_a_second_run_changes_nothing_and_a_killed_one_goes_on(script, data, tmp_path, monkeypatch):
    out = tmp_path / "real"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(script.unpack.__globals__, "_reid", killed)
    with pytest.raises(KeyboardInterrupt):
        script.unpack(data, out)
    assert not (out / "reid").exists()
    monkeypatch.undo()
    first = script.unpack(data, out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert script.unpack(data, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == times


def replace_lsp(data: Path, name: str) -> None:
    (data / "lsp_extended" / "images.zip").unlink()
    with zipfile.ZipFile(data / "lsp_extended" / "images.zip", "w") as archive:
        archive.writestr(name, jpeg(4))


@pytest.mark.parametrize("name", ["../../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg"])
def test_folders_of_a_member_are_dropped(script, data, tmp_path, name):
    replace_lsp(data, name)
    out = tmp_path / "real"
    script.unpack(data, out)
    assert list(tmp_path.rglob("*evil*")) == [out / "persons" / "lsp-evil.jpg"]


@pytest.mark.parametrize("name", ["a/..jpg", "-rf.jpg", "a b.jpg", "..\\e.jpg", "a/.jpg"])
def test_a_member_without_a_plain_name_is_refused(script, data, tmp_path, name):
    replace_lsp(data, name)
    with pytest.raises(DataError, match="does not end in a plain"):
        script.unpack(data, tmp_path / "real")
    assert not (tmp_path / "real" / "persons").exists()


def test_a_bomb_is_refused(script, data, tmp_path, monkeypatch):
    monkeypatch.setitem(script.unpack.__globals__, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(DataError, match=r"cuhk03_labeled/images\.zip: .* bytes"):
        script.unpack(data, tmp_path / "real")


def test_the_merge_table_must_name_every_class_once(script):
    names = [name for group in script.PARTS.values() for name in group]
    assert len(names) == 59
    table = script.merge_table(names)
    assert sorted(set(table.tolist())) == [*range(9), 255]
    with pytest.raises(DataError, match="trousers"):
        script.merge_table([*names[:-1], "trousers"])
