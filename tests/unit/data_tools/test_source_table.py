"""Tables: rows are whole pictures or persons; facts follow; damage is told by row; flat memory."""

import csv
import datetime
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_tools.source import Item
from dpal.base.errors import ConfigError, DataError

from made_sources import items_of, opened, write_pictures

HEADER = ["file", "left", "top", "right", "bottom", "identity", "camera"]
SIDES = ("left", "top", "right", "bottom")
ROWS: list[list[Any]] = [
    ["b.jpg", 1, 2, 11, 22, "p2", "c1"],
    ["a/x.jpg", 0, 0, 24, 40, "p1", "c1"],
    ["b.jpg", 3, 4, 5.5, 6, "p1", ""],
    ["c.jpg", "", "", "", "", "p3", "c2"],
]


def write_csv(path: Path, rows: Iterable[Sequence[Any]], header: Sequence[str] = HEADER) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerow(header)
        csv.writer(file).writerows(rows)
    return path


def write_parquet(path: Path, columns: Mapping[str, list[Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def by_name(items: Sequence[Item]) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {item.name: (item.box, dict(item.facts)) for item in items}


def test_rows_of_a_csv_are_persons_or_whole_pictures(tmp_path: Path) -> None:
    made = write_pictures(tmp_path, "a/x.jpg", "b.jpg", "c.jpg", "unnamed.jpg")
    url = write_csv(tmp_path / "list.csv", ROWS)
    items = items_of(url)
    assert by_name(items) == {
        "a/x.jpg#0": (
            (0, 0, 24, 40),
            {"boxes": [[0, 0, 24, 40]], "identity": "p1", "camera": "c1"},
        ),
        "b.jpg#0": ((1, 2, 11, 22), {"boxes": [[1, 2, 11, 22]], "identity": "p2", "camera": "c1"}),
        "b.jpg#1": ((3, 4, 5.5, 6), {"boxes": [[3, 4, 5.5, 6]], "identity": "p1"}),
        "c.jpg": (None, {"identity": "p3", "camera": "c2"}),
    }
    assert [item.size for item in items] == [len(made[item.picture]) for item in items]
    assert opened(url).read("a/x.jpg") == made["a/x.jpg"]


def test_rows_of_a_picture_are_one_scene(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a/x.jpg", "b.jpg", "c.jpg")
    items = items_of(write_csv(tmp_path / "list.csv", ROWS), persons="scenes")
    assert by_name(items)["b.jpg"] == (
        None,
        {
            "boxes": [[1, 2, 11, 22], [3, 4, 5.5, 6]],
            "persons": [{"identity": "p2", "camera": "c1"}, {"identity": "p1"}],
        },
    )
    assert by_name(items)["c.jpg"] == (None, {"boxes": [], "identity": "p3", "camera": "c2"})


def test_a_parquet_says_the_same_as_a_csv(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a/x.jpg", "b.jpg", "c.jpg")
    columns = {
        name: [row[place] if row[place] != "" else None for row in ROWS]
        for place, name in enumerate(HEADER)
    }
    for side in HEADER[1:5]:
        columns[side] = [None if x is None else float(x) for x in columns[side]]
    table = write_parquet(tmp_path / "list.parquet", columns)
    expected = items_of(write_csv(tmp_path / "list.csv", ROWS))
    assert by_name(items_of(table)) == by_name(expected)


def test_a_parquets_types_become_json(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    day = datetime.date(2024, 2, 29)
    columns = {"file": ["a.jpg"], "age": [31], "tags": [["x", "y"]], "day": [day], "no": [None]}
    (item,) = items_of(write_parquet(tmp_path / "t.parquet", columns))
    assert item.facts == {"age": 31, "tags": ["x", "y"], "day": "2024-02-29"}
    points = {"file": ["a.jpg"], "keypoints": [[[1.0, 2.0, 2.0]]]}
    (item,) = items_of(write_parquet(tmp_path / "t.parquet", points))
    assert item.facts == {"keypoints": [[[1, 2, 2]]]}
    bytes_column = {"file": ["a.jpg"], "raw": [b"\x00"]}
    with pytest.raises(DataError, match=r"t\.parquet, row 1: raw holds bytes"):
        items_of(write_parquet(tmp_path / "t.parquet", bytes_column))


def test_without_pyarrow_a_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"t\.parquet.*pip install 'dpal\[sources\]'"):
        items_of(tmp_path / "t.parquet")


def test_a_label_files_pid_and_cam_are_identity_and_camera(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    (item,) = items_of(
        write_csv(tmp_path / "labels.csv", [["a.jpg", 3, 1]], ["file", "pid", "cam"])
    )
    assert item.facts == {"identity": "3", "camera": "1"}
    with pytest.raises(DataError, match="each once"):
        items_of(write_csv(tmp_path / "t.csv", [["a.jpg", 3, 1]], ["file", "pid", "identity"]))


def test_pictures_may_lie_elsewhere_and_be_named_in_full(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "pictures", "a.jpg", "b.jpg")
    (tmp_path / "lists").mkdir()
    rows = [["a.jpg"], [f"{tmp_path}/pictures/b.jpg"]]
    table = write_csv(tmp_path / "lists" / "t.csv", rows, ["file"])
    items = items_of(table, pictures=str(tmp_path / "pictures"))
    assert [item.name for item in items] == ["a.jpg", "b.jpg"]
    assert all(item.size == len(made[item.name]) for item in items)


def test_a_missing_picture_is_an_item_without_size_and_none_at_all_is_refused(
    tmp_path: Path,
) -> None:
    write_pictures(tmp_path, "a.jpg", "deep/b.jpg")
    table = write_csv(tmp_path / "t.csv", [["a.jpg"], ["b.jpg"]], ["file"])
    assert [(i.name, i.size >= 0) for i in items_of(table)] == [("a.jpg", True), ("b.jpg", False)]
    table = write_csv(tmp_path / "t.csv", [["gone.jpg"], ["b.jpg"]], ["file"])
    with pytest.raises(DataError, match=r"names none of the images in .*'b\.jpg'.*data\.pictures"):
        items_of(table)


def test_the_version_follows_picture_and_facts(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    plain = items_of(write_csv(tmp_path / "t.csv", [["a.jpg"]], ["file"]))[0].version
    assert plain == items_of(tmp_path)[0].version
    one = items_of(write_csv(tmp_path / "t.csv", [["a.jpg", "x"]], ["file", "camera"]))[0].version
    two = items_of(write_csv(tmp_path / "t.csv", [["a.jpg", "y"]], ["file", "camera"]))[0].version
    assert len({plain, one, two}) == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"t\.csv.*begins with the columns \[\]: accepted are file"),
        ("name\na.jpg\n", r"begins with the columns \['name'\]: accepted are file"),
        ("file,left\na.jpg,1\n", "accepted are file,left,top,right,bottom"),
        ("file,x,x\na.jpg,1,2\n", "each once"),
        ("file,boxes\na.jpg,1\n", "but not boxes or persons"),
        ("file,keypoints\na.jpg,1\n", r"t\.csv:2: keypoints .* cannot be understood"),
        ("file\n../a.jpg\n", r"t\.csv:2: file '\.\./a\.jpg' is not below"),
        ("file\n/etc/passwd\n", r"t\.csv:2: file '/etc/passwd' is not below"),
        ("file\ns3://b/a.jpg\n", "is not below"),
        ("file,left,top,right,bottom\na.jpg,1,2,x,4\n", r"t\.csv:2: box .* is not four numbers"),
        ("file,left,top,right,bottom\na.jpg,1,2,,4\n", r"t\.csv:2: box .* is not four numbers"),
        ("file,left,top,right,bottom\na.jpg,1,2,nan,4\n", r"t\.csv:2: box .* is not finite"),
        ("file,camera\na.jpg,1,2,3\n", r"t\.csv:2: 2 columns are due"),
        ("file\na.jpg\n\n,\n", r"t\.csv:4: 1 columns are due|file is ''"),
        ("file\na.jpg\na.jpg\n", r"names 'a\.jpg' twice without boxes"),
        ('file\n"a.jpg\n', r"t\.csv' is no UTF-8 \.csv"),
        ("file\n\udce9.jpg\n", r"t\.csv' is no UTF-8 \.csv"),
    ],
)
def test_damage_is_told_by_file_and_row(tmp_path: Path, text: str, sentence: str) -> None:
    write_pictures(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=sentence):
        items_of(tmp_path / "t.csv")


@pytest.mark.parametrize("contents", [b"", b"PAR1 and no more", b"PAR1" * 100])
def test_a_damaged_parquet_is_told_by_its_name(tmp_path: Path, contents: bytes) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(contents)
    with pytest.raises(DataError, match=r"t\.parquet' is no readable \.parquet"):
        items_of(tmp_path / "t.parquet")


def test_flipped_bytes_of_a_parquet_end_in_items_or_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_pictures(tmp_path, "a.jpg")
    columns = {"file": ["a.jpg"] * 9, "pid": list(range(9)), **{side: [1] * 9 for side in SIDES}}
    table = write_parquet(tmp_path / "t.parquet", {**columns, "right": [9] * 9, "bottom": [9] * 9})
    whole, refused, rng = table.read_bytes(), 0, random.Random(0)
    for _time in range(100):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        table.write_bytes(changed)
        try:
            items_of(table)
        except DataError:
            refused += 1
    assert refused > 20


def test_boxes_without_area_are_left_out_and_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.jpg")
    rows = [["a.jpg", 5, 5, 5, 9], ["a.jpg", 1, 1, 2, 2], ["a.jpg", 9, 9, 1, 1]]
    source = opened(write_csv(tmp_path / "t.csv", rows, HEADER[:5]))
    assert [item.name for item in source.items()] == ["a.jpg#0"]
    assert source.left_out == {"box without area": 2}  # type: ignore[attr-defined]


READ = """
import resource, sys
from made_sources import opened
count = sum(1 for item in opened(sys.argv[1]).items() if item.facts["identity"])
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Largest resident size of a process that reads 200,000 rows, against 20,000 of them."""
    names = [f"{index:03}.jpg" for index in range(200)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    megabytes = []
    for count in (20_000, 200_000):
        rows = ([names[k % 200], k % 7, 0, 10 + k % 7, 9, f"person-{k}"] for k in range(count))
        table = write_csv(tmp_path / "t.csv", rows, HEADER[:6])
        path = f"{Path(__file__).parents[2]}:{Path(__file__).parents[3]}"
        answer = subprocess.run(
            [sys.executable, "-c", READ, str(table)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        read, kilobytes = map(int, answer.stdout.split())
        assert read == count
        megabytes.append(kilobytes / 1024)
    assert megabytes[1] < megabytes[0] + 32, megabytes
