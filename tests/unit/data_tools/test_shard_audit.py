"""Reading shards, auditing them, and the background pool."""

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_ingest import POLICY, picture, write_images

from data_tools.audit import audit_shards
from data_tools.backgrounds import LONG_SIDE, load_backgrounds
from data_tools.local_cache import LocalCache
from data_tools.manifest import Manifest, load_manifest
from data_tools.shard import read_shard
from data_tools.storage import LocalStore, ObjectStore, open_store
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError
from dpal.base.inputs import Storage
from dpal.base.recipe import Recipe
from jobs.audit import run_audit
from jobs.build_shards import build_shards, run


@pytest.fixture
def shards(tmp_path: Path) -> tuple[LocalStore, Manifest]:
    source = write_images(tmp_path / "in", 20)
    manifest = build_shards([str(source)], str(tmp_path / "out"), POLICY, Storage())
    return LocalStore(tmp_path / "out"), manifest


def flip_last_image_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_refused_by_name(shards: tuple[LocalStore, Manifest]) -> None:
    store, manifest = shards
    flip_last_image_byte(store.path("persons-000001.tar"))
    read_shard(store, manifest.shards[0], None)
    with pytest.raises(DataError, match=r"persons-000001\.tar' is damaged"):
        read_shard(store, manifest.shards[1], None)


@pytest.mark.parametrize("length", [0, 5000])
def test_a_truncated_shard_is_refused_by_name(
    shards: tuple[LocalStore, Manifest], length: int
) -> None:
    store, manifest = shards
    path = store.path("persons-000001.tar")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"persons-000001\.tar' is damaged"):
        read_shard(store, manifest.shards[1], None)


def test_a_shard_that_matches_its_checksum_but_not_its_keys_is_refused(
    shards: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = shards
    with pytest.raises(DataError, match="does not hold the samples"):
        read_shard(store, manifest.shards[0]._replace(keys_digest="0" * 16), None)


class Counting:
    """A remote store (not a folder) that counts its reads and may damage some."""

    def __init__(self, store: ObjectStore, damaged: int = 0) -> None:
        self.store, self.url, self.reads, self.damaged = store, "remote://x", 0, damaged

    def get(self, name: str) -> bytes:
        self.reads += 1
        data = self.store.get(name)
        return data[:-1] + b"x" if self.reads <= self.damaged else data


def test_a_remote_shard_is_fetched_once_and_then_read_from_the_cache(
    shards: tuple[LocalStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = shards
    remote, ref = Counting(store), manifest.shards[0]
    cache = LocalCache(tmp_path / "cache", 10**9)
    first = read_shard(remote, ref, cache)
    again = read_shard(remote, ref, cache)
    assert remote.reads == 1
    assert first.keys == again.keys
    assert [first.image_bytes(i) for i in range(8)] == [again.image_bytes(i) for i in range(8)]
    assert [path.name for path in (tmp_path / "cache").glob("*.tar")] == [f"{ref.sha256}.tar"]


def test_a_damaged_cached_copy_is_fetched_again(
    shards: tuple[LocalStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = shards
    remote, ref = Counting(store), manifest.shards[0]
    read_shard(remote, ref, LocalCache(tmp_path, 10**9))
    flip_last_image_byte(tmp_path / f"{ref.sha256}.tar")
    assert read_shard(remote, ref, LocalCache(tmp_path, 10**9)).image_bytes(0) == read_shard(
        store, ref, None
    ).image_bytes(0)
    assert remote.reads == 2


def test_damage_on_the_way_is_fetched_again_and_damage_in_the_store_is_an_error(
    shards: tuple[LocalStore, Manifest],
) -> None:
    store, manifest = shards
    assert len(read_shard(Counting(store, damaged=1), manifest.shards[0], None)) == 8
    with pytest.raises(DataError, match="remote://x/persons-000000"):
        read_shard(Counting(store, damaged=2), manifest.shards[0], None)


def _read_all(root: Path, cache: Path) -> None:
    store = LocalStore(root)
    for ref in load_manifest(store).shards:
        read_shard(Counting(store), ref, LocalCache(cache, 10**9))


def test_processes_may_fill_one_cache_at_once(
    shards: tuple[LocalStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = shards
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(store.root, tmp_path / "c")) for _ in "123"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    names = sorted(path.name for path in (tmp_path / "c").glob("*.tar"))
    assert names == sorted(f"{ref.sha256}.tar" for ref in manifest.shards)


def test_audit_of_good_shards_finds_nothing(
    shards: tuple[LocalStore, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit_shards(shards[0]) == []
    assert run_audit(shards[0].url, Storage()) == 0
    assert "as they should be" in capsys.readouterr().out


def test_audit_names_every_deviation(
    shards: tuple[LocalStore, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    store, _manifest = shards
    flip_last_image_byte(store.path("persons-000000.tar"))
    store.path("persons-000001.tar").write_bytes(b"short")
    store.delete("persons-000002.tar")
    store.put("stray.bin", b"1")
    found = {finding.name: finding.problem for finding in audit_shards(store)}
    assert set(found) == {f"persons-00000{i}.tar" for i in range(3)} | {"stray.bin"}
    assert "checksum" in found["persons-000000.tar"]
    assert "wrong size: 5 bytes" in found["persons-000001.tar"]
    assert "missing" in found["persons-000002.tar"]
    with pytest.raises(DataError, match="4 of the objects") as caught:
        run_audit(store.url, Storage())
    assert caught.value.exit_code == 3
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in printed) == sorted(found)


def test_audit_of_a_damaged_manifest_or_of_nothing_is_an_error(
    shards: tuple[LocalStore, Manifest], tmp_path: Path
) -> None:
    store, _manifest = shards
    store.put("manifest.json", b"{")
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(store.url, Storage())
    with pytest.raises(DataError, match="nothing to audit"):
        run_audit(str(tmp_path / "nothing"), Storage())


def recipe_of(tmp_path: Path, **data: object) -> Recipe:
    return resolve_recipe({
        "name": "t",
        "output": str(tmp_path / "runs"),
        "data": {"images": [str(tmp_path / "in")], "samples_per_shard": 8, **data},
        "teacher": {"kind": "timm", "name": "vit_small_patch14_dinov2.lvd142m"},
    })  # fmt: skip


def test_stage_shards_persons_and_backgrounds_and_skips_when_done(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 10)
    (tmp_path / "bg").mkdir()
    for seed in range(3):
        (tmp_path / f"bg/{seed}.jpg").write_bytes(picture(seed, size=(700, 300)))
    recipe = recipe_of(tmp_path, backgrounds=[str(tmp_path / "bg")])
    first, second = run(recipe), run(recipe)
    assert (first.skipped, second.skipped) == (False, True)
    assert first.detail == "10 images in 2 shards; 3 backgrounds in 1 shards"
    pool = load_backgrounds(recipe)
    assert pool.sizes == [(LONG_SIDE, 219)] * 3
    assert all(image.dtype == np.uint8 for image in pool.images)
    assert run_audit(recipe.data.shards, Storage()) == 0
    flip_last_image_byte(Path(recipe.data.shards) / "backgrounds/backgrounds-000000.tar")
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(recipe.data.shards, Storage())


def test_without_backgrounds_the_first_person_shard_serves(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 20)
    recipe = recipe_of(tmp_path, max_backgrounds=5)
    run(recipe)
    pool = load_backgrounds(recipe)
    assert pool.sizes == [(64, 40)] * 5
    assert load_backgrounds(recipe).digest == pool.digest
    other = load_backgrounds(recipe_of(tmp_path, max_backgrounds=6))
    assert len(other.images) == 6
    assert other.digest != pool.digest


def test_backgrounds_that_were_not_sharded_are_a_data_error(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, backgrounds=[str(tmp_path / "bg")])
    with pytest.raises(DataError, match="run `dpal shard`"):
        load_backgrounds(recipe)


def test_memory_stores_can_be_shard_destinations(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 20)
    url = f"memory://{tmp_path.name}/shards"
    manifest = build_shards([str(source)], url, POLICY, Storage())
    folder = build_shards([str(source)], str(tmp_path / "out"), POLICY, Storage())
    assert manifest == folder
    store = open_store(url, Storage())
    for ref in manifest.shards:
        assert store.get(ref.name) == (tmp_path / "out" / ref.name).read_bytes()
    shutil.rmtree(tmp_path / "out")
