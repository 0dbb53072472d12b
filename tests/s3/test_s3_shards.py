"""Sharding from S3 to S3: the same bytes as on disk, audits, and one sentence for refusals."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.audit import audit_shards
from data_tools.local_cache import LocalCache
from data_tools.manifest import load_manifest
from data_tools.shard import read_shard
from data_tools.storage import open_store
from dpal.base.errors import DataError, StorageError
from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

from seaweed import S3Server

POLICY = Data(images=("unused",), samples_per_shard=8)


def write_images(folder: Path, count: int) -> None:
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 40, 3), dtype=np.uint8)
        path = folder / f"d{seed % 3}" / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())


def test_s3_to_s3_gives_the_same_shards_as_folder_to_folder(
    s3_server: S3Server, tmp_path: Path
) -> None:
    write_images(tmp_path / "in", 20)
    storage, base = s3_server.storage(), s3_server.url()
    uploads = open_store(f"{base}/in", storage)
    for path in (tmp_path / "in").rglob("*.jpg"):
        uploads.put(path.relative_to(tmp_path / "in").as_posix(), path.read_bytes())
    local = build_shards([str(tmp_path / "in")], str(tmp_path / "out"), POLICY, Storage())
    remote = build_shards([f"{base}/in"], f"{base}/out", POLICY, storage)
    assert remote == local
    store = open_store(f"{base}/out", storage)
    assert load_manifest(store) == local
    for ref in remote.shards:
        assert store.get(ref.name) == (tmp_path / "out" / ref.name).read_bytes()
        shard = read_shard(store, ref, LocalCache(tmp_path / "cache", 10**9))
        assert shard.meta(0)["height"] == 64
    assert audit_shards(store) == []


def test_persons_of_a_table_on_s3_are_the_crops_that_a_folder_gives(
    s3_server: S3Server, tmp_path: Path
) -> None:
    write_images(tmp_path / "in", 12)
    rows = [
        [f"d{seed % 3}/{seed}.jpg", left, 2, left + 18, 60, f"id{seed}"]
        for seed in range(12)
        for left in (0, 20)
    ]
    with (tmp_path / "in" / "persons.csv").open("w", newline="") as file:
        names = ["file", "left", "top", "right", "bottom", "identity"]
        csv.writer(file).writerows([names, *rows])
    storage, base = s3_server.storage(), s3_server.url()
    uploads = open_store(f"{base}/in", storage)
    for path in (tmp_path / "in").rglob("*.*"):
        uploads.put(path.relative_to(tmp_path / "in").as_posix(), path.read_bytes())
    policy = Data(images=("persons.csv",), samples_per_shard=4, validation_fraction=0.4, min_side=8)
    local = build_shards(
        [str(tmp_path / "in" / "persons.csv")], str(tmp_path / "out"), policy, Storage()
    )
    remote = build_shards([f"{base}/in/persons.csv"], f"{base}/out", policy, storage)
    assert remote == local
    assert len(local.shards) >= 2
    for folder in ("out", "out/validation"):
        store = open_store(f"{base}/{folder}", storage)
        assert load_manifest(store) == load_manifest(open_store(str(tmp_path / folder), storage))
        assert audit_shards(store) == []


def test_a_second_run_on_s3_writes_nothing(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.remote import RemoteStore

    write_images(tmp_path / "in", 10)
    url, storage = f"{s3_server.url()}/out", s3_server.storage()
    build_shards([str(tmp_path / "in")], url, POLICY, storage)
    writes: list[str] = []
    monkeypatch.setattr(RemoteStore, "put", lambda self, name, data: writes.append(name))
    build_shards([str(tmp_path / "in")], url, POLICY, storage)
    assert writes == []


def test_audit_names_damage_on_s3(s3_server: S3Server, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 10)
    url, storage = f"{s3_server.url()}/out", s3_server.storage()
    manifest = build_shards([str(tmp_path / "in")], url, POLICY, storage)
    store = open_store(url, storage)
    data = bytearray(store.get("persons-000001.tar"))
    data[3000] ^= 1
    store.put("persons-000001.tar", bytes(data))
    (finding,) = audit_shards(store)
    assert finding.name == "persons-000001.tar"
    with pytest.raises(DataError, match="persons-000001"):
        read_shard(store, manifest.shards[1], None)
    assert not (tmp_path / "cache").exists()


def test_a_wrong_key_ends_sharding_at_once_with_exit_code_4(
    s3_server: S3Server, tmp_path: Path
) -> None:
    write_images(tmp_path / "in", 3)
    wrong = s3_server.storage(secret="hunter2-wrong-value", retries=5)
    for sources, dest in (
        ([str(tmp_path / "in")], f"{s3_server.url()}/out"),
        ([s3_server.url()], str(tmp_path / "out")),
    ):
        with pytest.raises(StorageError, match="refuses these credentials") as caught:
            build_shards(sources, dest, POLICY, wrong)
        assert caught.value.exit_code == 4
        assert "hunter2" not in str(caught.value)


def test_a_missing_prefix_is_a_data_error(s3_server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is empty"):
        build_shards([s3_server.url()], str(tmp_path / "out"), POLICY, s3_server.storage())
