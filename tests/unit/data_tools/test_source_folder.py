"""Folders of pictures: listed as the store lists them; names of re-identification sets are read."""

import os
import resource
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_tools.sources import catalogue
from data_tools.sources.folder import FolderSource
from data_tools.storage import Listed, LocalStore
from dpal.base.errors import ConfigError, DataError, StorageError

from made_sources import items_of, opened, write_pictures


def test_a_folder_gives_what_its_store_lists(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    made = write_pictures(folder, "a/b.jpg", "a.jpg", "a-b/ü.JPEG", "z/y/x.png", "a b.jpg")
    (folder / "notes.txt").write_text("hello")
    (folder / "dead.jpg").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / ".a.jpg.dpal-tmp-host-1-x").write_bytes(b"a write in progress")
    os.mkfifo(folder / "pipe")
    items = items_of(folder)
    listed = LocalStore(folder).listing()
    assert [(item.name, item.size, item.version) for item in items] == [tuple(e) for e in listed]
    assert {item.name for item in items if item.size < 0} == {"dead.jpg", "pipe"}
    assert all(item.picture == item.name and item.box is None and not item.facts for item in items)
    source = opened(folder)
    assert {name: source.read(name) for name in made} == made
    with pytest.raises(DataError, match="does not exist"):
        source.read("nobody.jpg")


def _listed_on_a_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    found = (Listed(f"{number:0200d}.jpg", 1, "v") for number in range(100_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "_listed", lambda _store: found)
        with pytest.raises(StorageError, match="TMPDIR"):
            catalogue.Catalogue(LocalStore(folder))
    os._exit(7)


def test_a_listing_that_no_disk_has_room_for_is_told(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=_listed_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7


def test_names_of_reid_sets_tell_identity_and_camera(tmp_path: Path) -> None:
    names = {
        "0002_c1s1_000451_03.jpg": {"identity": "0002", "camera": "1", "sequence": "1"},
        "q/1501_c6s4_001877_00.jpg": {"identity": "1501", "camera": "6", "sequence": "4"},
        "0001_c2_f0046182.jpg": {"identity": "0001", "camera": "2"},
        "0014_c1_23.png": {"identity": "0014", "camera": "1"},
        "0000_000_01_0303morning_0015_0.jpg": {"identity": "0000", "camera": "01"},
    }
    junk = ["-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0000_c2s1_000151_01.jpg"]
    write_pictures(tmp_path, *names, *junk)
    (tmp_path / "Thumbs.db").write_bytes(b"from a file manager")
    source = opened(tmp_path, names="market1501")
    assert isinstance(source, FolderSource)
    assert {i.name: i.facts for i in source.items() if i.name != "Thumbs.db"} == names
    assert source.left_out == {"junk": 1, "distractor": 2}
    plain = {item.name: item for item in items_of(tmp_path)}
    assert set(plain) == {*names, *junk, "Thumbs.db"}
    told = {item.name: item for item in items_of(tmp_path, names="market1501")}
    assert told["Thumbs.db"].version == plain["Thumbs.db"].version
    assert told["0014_c1_23.png"].version != plain["0014_c1_23.png"].version


def test_a_name_of_no_known_form_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, "0002_c1s1_000451_03.jpg", "holiday.jpg")
    with pytest.raises(DataError, match=r"holiday\.jpg.*data\.names=market1501.*0002_c1s1"):
        items_of(tmp_path, names="market1501")


def test_a_missing_folder_an_empty_one_and_an_unknown_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        items_of(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty: accepted are folders of JPEG or PNG"):
        items_of(tmp_path / "empty")
    (tmp_path / "all.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"all\.zip.*no known kind.*\.csv.*\.odgt.*\.tar"):
        items_of(tmp_path / "all.zip")


def test_a_folder_may_be_called_like_a_file_and_be_given_as_a_file_url(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "set.json", "a.jpg")
    assert [item.name for item in items_of(tmp_path / "set.json")] == list(made)
    assert [item.name for item in items_of(f"file://{tmp_path}/set.json/")] == list(made)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"pictures": "p"}, "data.pictures='p' has no effect"),
        ({"persons": "scenes"}, "data.persons='scenes' has no effect"),
        ({"margin": 0.2}, "data.margin=0.2 has no effect"),
    ],
)
def test_keys_of_annotations_are_refused_for_folders(
    keys: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        opened("folder", **keys)


@pytest.mark.parametrize("source", ["list.csv", "persons.json", "0.tar", "data.mdb", "synthetic"])
def test_names_are_refused_where_no_name_is_read(source: str) -> None:
    with pytest.raises(ValueError, match=r"data\.names=market1501 has no effect"):
        opened(source, names="market1501")


def test_a_margin_is_refused_for_scenes() -> None:
    with pytest.raises(ValueError, match=r"data\.margin has no effect with data\.persons=scenes"):
        opened("coco.json", persons="scenes", margin=0.3)
