"""The validation set: apart by identity, unmoved by new images, a data set of its own."""

import csv
import hashlib
from pathlib import Path

import pytest
from test_crops import encoded, smooth

from data_tools.manifest import load_manifest
from data_tools.shard import read_shard
from data_tools.storage import LocalStore
from dpal.base.errors import DataError
from dpal.base.inputs import Data, Storage
from jobs.audit import run_audit
from jobs.build_shards import build_shards

POLICY = Data(images=("unused",), samples_per_shard=16, validation_fraction=0.3)


def write_table(folder: Path, identities: list[str], images: int = 3) -> Path:
    """Pictures of every identity, and the table that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for identity in identities:
        for number in range(images):
            name = f"{identity}-{number}.png"
            seed = int(hashlib.sha256(name.encode()).hexdigest()[:6], 16)
            (folder / name).write_bytes(encoded(smooth(48, 40, seed)))
            rows.append([name, identity])
    with (folder / "persons.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "identity"], *rows])
    return folder / "persons.csv"


def identities_of(folder: Path) -> list[str]:
    store, told = LocalStore(folder), []
    for ref in load_manifest(store).shards:
        shard = read_shard(store, ref, None)
        told += [shard.meta(row)["identity"] for row in range(len(shard))]
    return told


def keys_of(folder: Path) -> set[str]:
    store = LocalStore(folder)
    return {key for ref in load_manifest(store).shards for key in read_shard(store, ref, None).keys}


def test_no_identity_is_in_both_sets_and_every_image_is_in_one(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(60)]
    table = write_table(tmp_path / "in", names)
    dest = tmp_path / "out"
    manifest = build_shards([str(table)], str(dest), POLICY, Storage())
    train, validation = identities_of(dest), identities_of(dest / "validation")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(names * 3)
    assert manifest.num_samples == len(train)
    assert 8 <= len(set(validation)) <= 28  # 18 are expected of 60
    assert run_audit(str(dest), Storage()) == 0
    before = {path: path.stat().st_ino for path in dest.rglob("*")}
    assert build_shards([str(table)], str(dest), POLICY, Storage()) == manifest
    assert {path: path.stat().st_ino for path in dest.rglob("*")} == before


def test_new_images_and_identities_move_nobody(tmp_path: Path) -> None:
    few, many = [f"p{number}" for number in range(30)], [f"p{number}" for number in range(50)]
    build_shards([str(write_table(tmp_path / "a", few, 2))], str(tmp_path / "1"), POLICY, Storage())
    build_shards([str(write_table(tmp_path / "b", many))], str(tmp_path / "2"), POLICY, Storage())
    before, after = (set(identities_of(tmp_path / n / "validation")) for n in "12")
    assert before < after
    assert after - before <= set(many) - set(few)


def test_a_larger_share_only_adds_identities(tmp_path: Path) -> None:
    table = write_table(tmp_path / "in", [f"p{number}" for number in range(40)], 1)
    more = POLICY.model_copy(update={"validation_fraction": 0.5})
    build_shards([str(table)], str(tmp_path / "1"), POLICY, Storage())
    build_shards([str(table)], str(tmp_path / "2"), more, Storage())
    small, large = (set(identities_of(tmp_path / n / "validation")) for n in "12")
    assert small < large


def test_images_without_identity_are_split_by_their_own_key(tmp_path: Path) -> None:
    for seed in range(60):
        path = tmp_path / "in" / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(smooth(48, 40, seed)))
    build_shards([str(tmp_path / "in")], str(tmp_path / "out"), POLICY, Storage())
    train, validation = keys_of(tmp_path / "out"), keys_of(tmp_path / "out" / "validation")
    assert not train & validation
    assert len(train | validation) == 60
    assert 8 <= len(validation) <= 28


def test_a_share_that_leaves_one_set_empty_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "in", ["only"])
    for share in (0.0001, 0.9999):
        data = POLICY.model_copy(update={"validation_fraction": share})
        with pytest.raises(DataError, match=r"leaves none of 3 images for (validation|pretrain)"):
            build_shards([str(table)], str(tmp_path / "out"), data, Storage())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_lost_validation_shard_is_written_again(tmp_path: Path) -> None:
    table = write_table(tmp_path / "in", [f"p{number}" for number in range(30)])
    dest = tmp_path / "out"
    build_shards([str(table)], str(dest), POLICY, Storage())
    lost = dest / "validation" / "persons-000000.tar"
    data = lost.read_bytes()
    lost.unlink()
    build_shards([str(table)], str(dest), POLICY, Storage())
    assert lost.read_bytes() == data
