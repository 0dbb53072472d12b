"""Every way in which images lie about, on S3: the same items and bytes as in a local folder."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.storage import open_store
from dpal.base.errors import DataError
from dpal.base.inputs import Storage

from made_sources import coco, gtbox, jpeg, odgt, opened, write_lmdb, write_pictures, write_tar
from seaweed import S3Server


def write_all(root: Path) -> None:
    """A folder, a table, COCO, CrowdHuman, tars and an LMDB environment."""
    write_pictures(root / "folder", "0002_c1s1_000451_03.jpg", "q/0003_c2s1_000001_00.jpg")
    write_pictures(root / "lists" / "Images", "a.jpg", "b.jpg", "sub/c.jpg")
    with (root / "lists" / "table.csv").open("w", newline="") as file:
        rows = [["file", "left", "top", "right", "bottom", "camera"], ["b.jpg", 1, 2, 9, 9, "x"]]
        csv.writer(file).writerows([*rows, ["sub/c.jpg", "", "", "", "", "y"]])
    (root / "lists" / "coco.json").write_text(json.dumps(coco()))
    (root / "lists" / "val.odgt").write_text(odgt("a", gtbox(1)) + odgt("c", gtbox(2), gtbox(3)))
    for name in ("0.tar", "1.tar"):
        write_tar(root / "tars" / name, {"k.jpg": jpeg(5), "k.txt": b"hello", "l.png": jpeg(6)})
    write_lmdb(root / "lmdb", {b"02_01_0003_00000004": jpeg(7), b"x": jpeg(8)})
    (root / "lmdb" / "lock.mdb").unlink()


def upload(root: Path, url: str, storage: Storage) -> None:
    store = open_store(url, storage)
    for path in root.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(root).as_posix(), path.read_bytes())


KINDS: dict[str, dict[str, Any]] = {
    "folder": {"names": "market1501"},
    "lists/table.csv": {"pictures": "lists/Images"},
    "lists/coco.json": {},
    "lists/val.odgt": {"persons": "scenes"},
    "tars": {},
    "tars/1.tar": {},
    "lmdb": {},
}


def test_items_and_bytes_are_those_of_the_local_files(s3_server: S3Server, tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    write_all(tmp_path)
    storage, base = s3_server.storage(), s3_server.url()
    upload(tmp_path, base, storage)
    for kind, keys in KINDS.items():
        told = []
        for root in (str(tmp_path), base):
            below = {"pictures": f"{root}/{keys['pictures']}"} if "pictures" in keys else {}
            source = opened(f"{root}/{kind}", storage, **{**keys, **below})
            assert source.url == f"{root}/{kind}"
            told.append(
                [(item._replace(version=""), source.read(item.picture)) for item in source.items()]
            )
            versions = [item.version for item in source.items()]
            assert versions == [item.version for item in source.items()]
        assert told[0] == told[1], kind
        assert told[0], kind


def test_what_is_not_there_is_a_data_error(s3_server: S3Server) -> None:
    storage, base = s3_server.storage(), s3_server.url()
    for kind in ("nowhere", "t.csv", "c.json", "v.odgt", "t.tar", "data.mdb"):
        with pytest.raises(DataError, match="does not exist"):
            list(opened(f"{base}/{kind}", storage).items())


def test_a_listing_by_pages_is_the_listing(s3_server: S3Server) -> None:
    from data_tools.remote import RemoteStore
    from data_tools.sources.s3_pages import listed_by_pages

    store = open_store(s3_server.url(), s3_server.storage())
    assert isinstance(store, RemoteStore)
    names = [f"{k % 7}/{k}.jpg" for k in range(40)] + ["a b/ü.jpg", "x+y&z=%41.jpg"]
    for name in names:
        store.put(name, name.encode())
    whole = list(listed_by_pages(store))
    assert sorted(whole) == list(store.listing())
    assert {entry.name for entry in whole} == set(names)

    call, pages = store.call, []

    def small_pages(verb: str, name: str, attempt: Any) -> Any:
        def of_nine(fs: Any) -> Any:
            class Small:
                def call_s3(self, method: str, **request: str) -> Any:
                    pages.append(request.get("ContinuationToken", ""))
                    return fs.call_s3(method, **request, MaxKeys=9)

            return attempt(Small())

        return call(verb, name, of_nine)

    store.call = small_pages  # type: ignore[method-assign]
    assert list(listed_by_pages(store)) == whole
    assert len(set(pages)) == 5
    with pytest.raises(DataError, match="does not exist or is empty"):
        list(listed_by_pages(RemoteStore(f"{store.url}/nowhere", s3_server.storage())))


def test_a_tar_is_read_by_ranges_once_its_copy_is_gone(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, base = s3_server.storage(), s3_server.url()
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", {"k.jpg": jpeg(number)})
    upload(tmp_path, base, storage)
    source = opened(base, storage)
    items = list(source.items())
    from data_tools.remote import RemoteStore

    ranges: list[tuple[str, int]] = []
    get_range = RemoteStore.get_range

    def counted(store: RemoteStore, name: str, start: int, length: int) -> bytes:
        ranges.append((name, length))
        return get_range(store, name, start, length)

    monkeypatch.setattr(RemoteStore, "get_range", counted)
    assert [source.read(item.picture) for item in items] == [jpeg(number) for number in range(4)]
    assert ranges == [("0.tar", len(jpeg(0))), ("1.tar", len(jpeg(1)))]
