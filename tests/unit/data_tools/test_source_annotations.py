"""COCO and CrowdHuman: persons or scenes with what is told of them; damage is told by file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.sources import text
from dpal.base.errors import DataError

from made_sources import coco, gtbox, items_of, odgt, opened, write_pictures

POINTS = [[float(3 * k), float(3 * k + 1), 3 * k + 2] for k in range(17)]
POLYGONS = [[1, 2, 11, 2, 11, 22.5]]
RLE = {"size": [40, 24], "counts": [0, 3, 957]}


def write_coco(folder: Path, **changes: Any) -> Path:
    write_pictures(folder, "a.jpg", "b.jpg")
    (folder / "persons.json").write_text(json.dumps(coco(**changes)))
    return folder / "persons.json"


def test_coco_persons_are_crops_with_keypoints_and_mask(tmp_path: Path) -> None:
    source = opened(write_coco(tmp_path))
    first, second = source.items()
    assert (first.name, first.picture, first.box) == ("a.jpg#0", "a.jpg", (1, 2, 11, 22))
    assert first.facts == {"boxes": [[1, 2, 11, 22]], "keypoints": [POINTS], "masks": [POLYGONS]}
    assert (second.name, second.box) == ("a.jpg#1", (3.5, 4, 8.5, 10))
    assert second.facts == {"boxes": [[3.5, 4, 8.5, 10]], "masks": [RLE]}
    assert source.left_out == {"crowd": 1, "box without area": 1}  # type: ignore[attr-defined]


def test_coco_scenes_have_lists_as_long_as_their_boxes(tmp_path: Path) -> None:
    crowd, nobody = items_of(write_coco(tmp_path), persons="scenes")
    assert (crowd.name, crowd.box, nobody.name) == ("a.jpg", None, "b.jpg")
    assert crowd.facts == {
        "boxes": [[1, 2, 11, 22], [3.5, 4, 8.5, 10]],
        "keypoints": [POINTS, None],
        "masks": [POLYGONS, RLE],
    }
    assert nobody.facts == {"boxes": []}


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_parts_of_a_coco_file_does_not_matter(
    tmp_path: Path, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_coco(tmp_path)
    expected = items_of(url)
    monkeypatch.setattr(text, "PIECE", 7)  # every value ends in another piece
    url.write_text(json.dumps(dict(sorted(coco().items())[::order]), indent=1))
    assert items_of(url) == expected


def test_pictures_are_found_below_the_folder_by_their_own_names(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", "train/a.jpg", "val/b.jpg", "val/c.jpg", "train/c.jpg")
    images = [
        {"id": n, "file_name": name} for n, name in enumerate(("a.jpg", "val/b.jpg", "c.jpg"))
    ]
    person = {"category_id": 1, "bbox": [0, 0, 9, 9]}
    rows = [{**person, "image_id": n} for n in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps(coco(images=images, annotations=rows)))
    items = items_of(tmp_path / "coco.json", pictures=str(tmp_path / "images"))
    assert [(item.name, item.size >= 0) for item in items] == [
        ("c.jpg#0", False),  # two are called so
        ("train/a.jpg#0", True),
        ("val/b.jpg#0", True),
    ]


def test_ten_and_more_persons_of_a_picture_are_sorted_by_name(tmp_path: Path) -> None:
    person = {"image_id": 7, "category_id": 1}
    rows = [{**person, "bbox": [k, 0, 5, 5]} for k in range(12)]
    items = items_of(write_coco(tmp_path, annotations=rows))
    assert {item.name: item.box[0] for item in items if item.box} == {
        f"a.jpg#{k}": k for k in range(12)
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": []}, r"persons\.json' is no COCO instances file \(KeyError"),
        ({"images": [{"id": 7}]}, r"no COCO instances file \(KeyError 'file_name'"),
        ({"images": [{"id": 7, "file_name": 3}]}, "no COCO instances file .*3 is no text"),
        ({"images": [{"id": 7, "file_name": "a.jpg"}] * 2}, "no COCO instances file .*UNIQUE"),
        ({"categories": [{"id": 1, "name": "cat"}]}, "no category is called 'person'"),
        ({"annotations": [7]}, r"no COCO instances file \(TypeError"),
        ({"annotations": "none"}, "no COCO instances file"),
        ({"annotations": [{"image_id": 7, "category_id": 1}]}, "image 'a.jpg': box None"),
        ({"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2]}]}, "not four numbers"),
    ],
)
def test_a_damaged_coco_file_is_told_by_its_name(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    url = write_coco(tmp_path, **changes)
    with pytest.raises(DataError, match=sentence):
        items_of(url)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"keypoints": [1, 2]}, "2 numbers are no triples"),
        ({"keypoints": ["x", 2, 3]}, "cannot be understood"),
        ({"keypoints": [10**400, 2, 3]}, "too large"),
        ({"bbox": [0, 0, 10**400, 9]}, "not four numbers"),
        ({"segmentation": [[1, 2, 3]]}, "odd count"),
        ({"segmentation": {"counts": []}}, "cannot be understood"),
    ],
)
def test_a_damaged_person_is_told_by_its_picture(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    person = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], **changes}
    with pytest.raises(DataError, match=f"image 'a.jpg'.*{sentence}"):
        items_of(write_coco(tmp_path, annotations=[person]))


@pytest.mark.parametrize("fact", ["keypoints", "bbox"])
def test_an_infinite_number_is_none(tmp_path: Path, fact: str) -> None:
    url = write_coco(tmp_path)
    person = '{"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "%s": [1e999, 2, 3, 4]}'
    told = json.dumps(coco(annotations=[])).replace(
        '"annotations": []', f'"annotations": [{person % fact}]'
    )
    url.write_text(told)
    with pytest.raises(DataError, match="1e999 is too large a number"):
        items_of(url)


def test_a_coco_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    url = write_coco(tmp_path)
    whole = url.read_bytes()
    for length in range(0, len(whole), 17):
        url.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"persons\.json' is no COCO instances file"):
            items_of(url)


def test_crowdhuman_persons_are_full_boxes_with_visible_part_and_head(tmp_path: Path) -> None:
    write_pictures(tmp_path / "Images", "1,a.jpg", "2,b.jpg", "3,c.jpg")
    lines = [
        odgt("2,b", gtbox(1), gtbox(5, head_attr={"ignore": 1}), gtbox(9, tag="mask")),
        odgt("1,a", gtbox(2, extra={"ignore": 1}), gtbox(3, extra={}, head_attr={})),
        odgt("3,c"),
    ]
    (tmp_path / "annotation_val.odgt").write_text("".join(lines))
    source = opened(tmp_path / "annotation_val.odgt")
    items = {item.name: item for item in source.items()}
    assert items["Images/2,b.jpg#0"].box == (1, -2, 11, 18)
    assert items["Images/2,b.jpg#0"].facts == {
        "boxes": [[1, -2, 11, 18]],
        "visible_boxes": [[1, 0, 11, 10]],
        "head_boxes": [[4, 0, 8, 4]],
    }
    assert "head_boxes" not in items["Images/2,b.jpg#1"].facts
    assert list(items) == ["Images/1,a.jpg#0", "Images/2,b.jpg#0", "Images/2,b.jpg#1"]
    assert source.left_out == {"tag mask": 1, "to be ignored": 1}  # type: ignore[attr-defined]


def test_crowdhuman_scenes_keep_pictures_without_persons(tmp_path: Path) -> None:
    write_pictures(tmp_path, "1,a.jpg", "3,c.jpg")
    lines = [odgt("1,a", gtbox(1), gtbox(5, head_attr={"ignore": 1})), "\n", odgt("3,c")]
    (tmp_path / "val.odgt").write_text("".join(lines))
    crowd, nobody = items_of(tmp_path / "val.odgt", persons="scenes")
    assert crowd.facts["boxes"] == [[1, -2, 11, 18], [5, -2, 15, 18]]
    assert crowd.facts["head_boxes"] == [[4, 0, 8, 4], None]
    assert (nobody.name, nobody.facts) == ("3,c.jpg", {"boxes": []})


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"val\.odgt:2 is no picture of a CrowdHuman"),
        ("[]", r"val\.odgt:2 is no picture"),
        ('{"ID": "x"}', "KeyError 'gtboxes'"),
        ('{"ID": 3, "gtboxes": []}', "ID 3 is no text"),
        (odgt("x", {"tag": "person"}), "KeyError 'fbox'"),
        (odgt("x", gtbox(1, fbox=[1, 2, 3])), r"val\.odgt:2: box .* is not four numbers"),
        ('{"ID": "x", "gtboxes": [{"tag": "person", "fbox": [NaN, 0, 1, 1]}]}', "NaN is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "is no UTF-8"),
    ],
)
def test_a_damaged_odgt_is_told_by_file_and_line(tmp_path: Path, line: str, sentence: str) -> None:
    write_pictures(tmp_path, "1,a.jpg")
    contents = odgt("1,a", gtbox(1)) + line
    (tmp_path / "val.odgt").write_bytes(contents.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=sentence):
        items_of(tmp_path / "val.odgt")


def test_annotations_cannot_name_files_outside_their_folder(tmp_path: Path) -> None:
    write_pictures(tmp_path, "in/a.jpg", "secret.jpg")
    images = [{"id": 7, "file_name": "../secret.jpg"}]
    (tmp_path / "in" / "c.json").write_text(json.dumps(coco(images=images)))
    with pytest.raises(DataError, match=r"'\.\./secret\.jpg' .* is not a plain relative name"):
        items_of(tmp_path / "in" / "c.json")
