"""Evaluation folders: what their label files mean and which are refused."""

from pathlib import Path

import pytest

from data_tools.labelled import labels_digest, read_parsing, read_reid
from dpal.base.errors import DataError


def folder_with(tmp_path: Path, labels: str, classes: str = '["background", "person"]') -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg", "m.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text(labels)
    (tmp_path / "classes.json").write_text(classes)
    return tmp_path


def test_roles_decide_who_is_searched_and_who_is_found(tmp_path):
    labels = "file,pid,cam,role\na.jpg,7,0,query\nb.jpg,7,1,gallery\nc.jpg,x,1,both\n"
    data = read_reid(folder_with(tmp_path, labels))
    assert [path.name for path in data.files] == ["a.jpg", "b.jpg", "c.jpg"]
    assert data.query.tolist() == [True, False, True]
    assert data.gallery.tolist() == [False, True, True]
    assert data.pids[0] == data.pids[1] != data.pids[2]
    assert data.cams.tolist() == [0, 1, 1]


def test_cameras_and_roles_may_be_absent(tmp_path):
    data = read_reid(folder_with(tmp_path, "file,pid\na.jpg,1\nb.jpg,1\n"))
    assert data.cams is None
    assert data.query.all()
    assert data.gallery.all()


def test_a_byte_order_mark_of_a_spreadsheet_is_no_column_name(tmp_path):
    assert len(read_reid(folder_with(tmp_path, "\ufefffile,pid\na.jpg,1\n")).files) == 1


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("file,pid,role\na.jpg,1,probe\n", "line 2: role 'probe'; accepted is query, gallery or"),
        ("file,pid,cam\na.jpg,1,0\nb.jpg,1,\n", "line 3: cam is empty, in other lines not"),
        ("file,pid\na.jpg,1\nb.jpg,\n", "line 3: pid is empty"),
        ("file,pid\na.jpg\n", "line 2: pid is empty"),
        ("file,pid\n", "has no rows"),
        ("", "has no column 'file'"),
        ("file,pid\n/etc/hostname,1\n", "outside the folder"),
        ("file,pid\n../a.jpg,1\n", "outside the folder"),
    ],
)
def test_bad_reid_labels_are_refused_with_their_line(tmp_path, labels, words):
    with pytest.raises(DataError) as caught:
        read_reid(folder_with(tmp_path, labels))
    assert words in str(caught.value)


def test_a_binary_label_file_is_refused(tmp_path):
    folder_with(tmp_path, "")
    (tmp_path / "labels.csv").write_bytes(b"file,pid\n\xff\xfe\x00")
    with pytest.raises(DataError, match="not a CSV text file"):
        read_reid(tmp_path)


def test_parsing_splits_keep_image_and_mask_together(tmp_path):
    labels = "file,mask,split\na.jpg,m.png,train\nb.jpg,m.png,test\nc.jpg,m.png,train\n"
    data = read_parsing(folder_with(tmp_path, labels))
    assert [path.name for path in data.train.files] == ["a.jpg", "c.jpg"]
    assert len(data.train.masks) == 2
    assert data.classes == ("background", "person")


@pytest.mark.parametrize("classes", ["{}", "[1, 2]", '["one"]', '["a", "a"]', "no json"])
def test_bad_class_names_are_refused(tmp_path, classes):
    labels = "file,mask,split\na.jpg,m.png,train\nb.jpg,m.png,test\n"
    with pytest.raises(DataError, match="list of 2 to 255 different names"):
        read_parsing(folder_with(tmp_path, labels, classes))


def test_digest_follows_labels_classes_and_file_sizes(tmp_path):
    labels = "file,mask,split\na.jpg,m.png,train\nb.jpg,m.png,test\n"
    folder = folder_with(tmp_path, labels)
    digests = [labels_digest(folder)]
    (folder / "classes.json").write_text('["background", "human"]')
    digests.append(labels_digest(folder))
    (folder / "m.png").write_bytes(b"longer")
    digests.append(labels_digest(folder))
    (folder / "labels.csv").write_text(labels.replace("b.jpg", "c.jpg"))
    digests.append(labels_digest(folder))
    assert len(set(digests)) == 4
    assert labels_digest(folder) == digests[-1]
