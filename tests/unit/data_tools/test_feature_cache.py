"""The target cache: what is published is whole, belongs to its images, and says what it is of."""

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_tools.dated import Dated
from data_tools.feature_cache import (
    HEADER,
    LedgerRow,
    TargetCache,
    finished_shards,
    open_cache,
    open_cache_store,
    series_of,
)
from data_tools.local_cache import LocalCache
from data_tools.manifest import Manifest, ShardRef, keys_digest
from data_tools.storage import LocalStore
from data_tools.target_tar import TargetShard, TargetTarBuilder
from data_tools.unused import delete_cache, delete_orphans
from dpal.base.config import resolve_recipe
from dpal.base.errors import DataError
from dpal.base.inputs import Views
from dpal.calibration import fit_header
from dpal.record import spec_numbers
from dpal.targets.coding import encode_batch
from dpal.targets.header import TargetDefinition, TargetHeader
from dpal.views.specs import Box, ViewSpec

KEYS = tuple(f"{index:016x}" for index in range(6))
REF = ShardRef("persons-000000.tar", "ab" * 32, 999, len(KEYS), keys_digest(KEYS))
DEFINITION = TargetDefinition(
    teacher={"name": "vit", "weights": "aa"},
    views={"seed": 0},
    grid=(8, 4),
    composite_grid=(8, 8),
    codec="int8",
    manifest="mm",
    backgrounds="bb",
    calibration_images=8,
)


def made(count: int = 6, seed: int = 0, num_patches: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cls = rng.normal(size=(count, 24)).astype(np.float32)
    return cls, rng.normal(size=(count, num_patches, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def header() -> TargetHeader:
    return fit_header(DEFINITION, *made(8), ["k"] * 8)


def tar(header: TargetHeader, kind: str = "view", seed: int = 0, keys=KEYS) -> bytes:
    cls, patches = made(len(keys), seed, 32 if kind == "view" else 64)
    spec = ViewSpec(Box(0, 0, 9, 9), False)
    numbers = np.zeros((len(keys), header.layout(kind).cls_start // 2), dtype=np.uint16)
    numbers[:, :6] = spec_numbers(spec)
    builder = TargetTarBuilder(keys, header.layout(kind))
    records = encode_batch(cls, patches, numbers, header, kind)
    builder.fill(3, records[3:])  # any order of filling gives the same bytes
    builder.fill(0, records[:3])
    return builder.to_bytes()


def tars(header: TargetHeader, seed: int = 0) -> dict[str, bytes]:
    return {"view-0": tar(header, seed=seed), "composite-0": tar(header, "composite", seed)}


@pytest.fixture
def cache(tmp_path: Path, header: TargetHeader) -> TargetCache:
    return TargetCache.publish(LocalStore(tmp_path / "targets-x"), header)


def test_stock_webdataset_reads_a_target_tar(tmp_path: Path, header: TargetHeader) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(tar(header))
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(KEYS)
    records = TargetShard(path.read_bytes(), header.layout("view"), "t").records(range(6))
    assert [sample["targets"] for sample in samples] == [row.tobytes() for row in records]


def test_rows_are_gathered_in_the_order_asked_for(cache: TargetCache, header) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    shard = cache.shard("view-0", REF)
    everything = shard.records(range(6))
    np.testing.assert_array_equal(shard.records([4, 0, 4]), everything[[4, 0, 4]])
    assert shard.keys == KEYS


def test_a_shard_counts_only_when_its_ledger_row_is_there(cache: TargetCache, header) -> None:
    cache.store.put("view-0/persons-000000.tar", tar(header))
    assert cache.finished() == set()
    manifest = Manifest((REF,))
    with pytest.raises(DataError, match=r"lacks 1 of 1 shards.*persons-000000"):
        cache.require_complete(manifest)
    cache.publish_shard(REF, KEYS, tars(header))
    assert cache.finished() == {REF.name}
    cache.require_complete(manifest)


def test_threads_that_ask_for_one_row_at_once_read_it_once(
    cache: TargetCache, header: TargetHeader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    fresh, read = TargetCache(cache.store, header), []

    def slowly(name: str) -> bytes:
        read.append(name)
        time.sleep(0.05)
        return LocalStore.get(cache.store, name)

    monkeypatch.setattr(cache.store, "get", slowly)
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(fresh.row, [REF] * 8))
    assert len(read) == 1
    assert all(row is rows[0] for row in rows)


def test_a_damaged_record_names_file_and_key(cache: TargetCache, header) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    path = cache.store.path("view-0/persons-000000.tar")
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 6 + 700] ^= 1
    path.write_bytes(data)
    shard = cache.shard("view-0", REF)
    shard.records([0, 5])
    with pytest.raises(DataError, match=rf"view-0/persons-000000.tar.*{KEYS[2]}"):
        shard.records(range(6))


def test_a_tar_that_is_gone_is_told_with_what_mends_it(cache: TargetCache, header) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    cache.store.delete("view-0/persons-000000.tar")
    with pytest.raises(
        DataError, match=r"^targets '.*view-0/persons-000000\.tar' are missing; del"
    ):
        cache.shard("view-0", REF)
    with pytest.raises(DataError, match=r"lack 'view-7'; delete .*ledger/persons-000000\.json, "):
        cache.shard("view-7", REF)


@pytest.mark.parametrize("cut", [1, 512, 4000])
def test_a_truncated_tar_is_refused(cache: TargetCache, header, cut: int) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    path = cache.store.path("composite-0/persons-000000.tar")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"composite-0/persons-000000\.tar"):
        cache.shard("composite-0", REF)


def test_targets_of_other_samples_are_refused(cache: TargetCache, header) -> None:
    others = tuple(reversed(KEYS))
    cache.publish_shard(REF, others, {"view-0": tar(header, keys=others)})
    with pytest.raises(DataError, match="not of the samples"):
        cache.shard("view-0", REF)
    shard = TargetShard(tar(header), header.layout("view"), "t.tar")
    with pytest.raises(DataError, match="row 0"):
        shard.require_keys(others)
    with pytest.raises(DataError, match="6 records for 5 images"):
        shard.require_keys(KEYS[:5])


def test_targets_of_a_rebuilt_image_shard_are_refused(cache: TargetCache, header) -> None:
    cache.publish_shard(REF, KEYS, tars(header))
    with pytest.raises(DataError, match="other images"):
        cache.shard("view-0", REF._replace(sha256="cd" * 32))
    with pytest.raises(DataError, match="lack 'view-7'"):
        cache.shard("view-7", REF)


def test_a_rival_job_keeps_what_was_published_first(cache: TargetCache, header) -> None:
    first = tars(header)
    cache.store.put_if_absent("view-0/persons-000000.tar", first["view-0"])
    row = cache.publish_shard(REF, KEYS, tars(header, seed=1))  # other bits, as on another GPU
    published = cache.store.get("view-0/persons-000000.tar")
    assert published == first["view-0"]
    assert row.series["view-0"].sha256 == hashlib.sha256(published).hexdigest()
    assert cache.row(REF) == row


def test_what_damage_left_behind_is_replaced(cache: TargetCache, header) -> None:
    cache.store.put("view-0/persons-000000.tar", tar(header)[:-700])
    cache.publish_shard(REF, KEYS, tars(header))
    assert cache.store.get("view-0/persons-000000.tar") == tar(header)


def test_the_header_of_the_first_writer_stands(tmp_path: Path, header: TargetHeader) -> None:
    store = LocalStore(tmp_path)
    TargetCache.publish(store, header)
    again = TargetCache.publish(store, replace(header, low=header.low - 1))
    assert again.header.low == header.low


def test_a_cache_of_another_teacher_is_refused_by_name(cache: TargetCache) -> None:
    other = replace(DEFINITION, teacher={"name": "vit", "weights": "bb"})
    with pytest.raises(DataError, match=r"teacher\.weights \('bb' against 'aa'\)"):
        TargetCache.open(cache.store, other)


def test_a_missing_cache_says_what_the_one_beside_it_differs_in(tmp_path, header) -> None:
    recipe = resolve_recipe(
        {
            "name": "t",
            "output": str(tmp_path),
            "data": {"images": ["synthetic"]},
            "teacher": {"kind": "taught"},
            "student": {},
            "train": {"duration": "1 steps", "global_batch": 8, "micro_batch": 8},
        }
    )
    with pytest.raises(DataError, match=r"run `dpal cache`$"):
        open_cache(recipe, DEFINITION)
    TargetCache.publish(open_cache_store(recipe, DEFINITION), header)
    assert open_cache(recipe, DEFINITION).header.digest == DEFINITION.digest
    with pytest.raises(DataError, match=r"differs in codec \('fp16' against 'int8'\)"):
        open_cache(recipe, replace(DEFINITION, codec="fp16"))


class FarStore(LocalStore):
    """A folder that is read like a remote store, and damages the first answers on the way."""

    def __init__(self, root: Path, damage: int = 0) -> None:
        super().__init__(root)
        self.damage, self.gets = damage, 0

    def get(self, name: str) -> bytes:
        data = super().get(name)
        if name.endswith(".tar"):
            self.gets += 1
            if self.gets <= self.damage:
                return data[:-1] + b"!"
        return data


@pytest.fixture
def far(monkeypatch, tmp_path: Path, header: TargetHeader) -> TargetCache:
    cache = TargetCache.publish(LocalStore(tmp_path / "far"), header)
    cache.publish_shard(REF, KEYS, tars(header))
    monkeypatch.setattr("data_tools.feature_cache.LocalStore", _OnlyCopies)
    return TargetCache(FarStore(tmp_path / "far"), header)


class _OnlyCopies(LocalStore):
    """Stands for the local store while `FarStore` plays a remote one."""


def test_a_remote_tar_is_fetched_once_and_kept_by_checksum(far: TargetCache, tmp_path) -> None:
    expected = far.shard("view-0", REF).records(range(6))
    for _time in range(3):
        kept = far.shard("view-0", REF, LocalCache(tmp_path / "copies", 10**9))
        np.testing.assert_array_equal(kept.records(range(6)), expected)
    assert far.store.gets == 2
    digest = far.row(REF).series["view-0"].sha256
    assert [path.stem for path in (tmp_path / "copies").glob("*.tar")] == [digest]


def test_damage_on_the_way_is_fetched_again_and_damage_at_rest_is_told(far: TargetCache) -> None:
    far.store.damage = 1
    assert len(far.shard("view-0", REF)) == 6
    far.store.damage = 99
    with pytest.raises(DataError, match="checksum"):
        far.shard("view-0", REF)


@pytest.mark.parametrize(
    "series", [["{victim}", 5], ["ab" * 32, "5"], ["ab" * 32, 0], ["AB" * 32, 5], ["ab" * 32]]
)
def test_a_ledger_row_never_names_a_file_of_this_machine(
    far: TargetCache, tmp_path: Path, series: list
) -> None:
    """A checksum that is a path used to have the file there deleted, as a damaged copy."""
    victim = tmp_path / "victim.tar"
    victim.write_bytes(b"not ours")
    name = "ledger/persons-000000.json"
    row = json.loads(far.store.get(name))
    row["series"]["view-0"] = [
        str(victim.with_suffix("")) if part == "{victim}" else part for part in series
    ]
    far.store.put(name, json.dumps(row).encode())
    with pytest.raises(DataError, match=r"ledger row .* is damaged"):
        far.shard("view-0", REF, LocalCache(tmp_path / "copies", 10**9))
    assert victim.read_bytes() == b"not ours"


def test_a_ledger_row_nested_too_deeply_is_damaged() -> None:
    with pytest.raises(DataError, match="is damaged"):
        LedgerRow.from_json(b"[" * 100_000, "row")


def test_keys_that_a_tar_header_cannot_hold_are_refused(header: TargetHeader) -> None:
    with pytest.raises(DataError, match="tar header"):
        TargetTarBuilder(["k" * 300], header.layout("view"))


def test_series_are_named_by_kind_and_number(tmp_path: Path) -> None:
    assert series_of(Views(count=2, composites=1)) == ("view-0", "view-1", "composite-0")
    assert finished_shards(LocalStore(tmp_path / "nothing")) == set()


class Meeting(LocalStore):
    """Has somebody else do something right before its operation number `when`."""

    def __init__(self, root: Path, when: int, other: Callable[[], object]) -> None:
        super().__init__(root)
        self.when, self.other, self.count, self.inside = when, other, 0, False

    def _now(self) -> None:
        if self.inside:
            return
        self.count += 1
        if self.count == self.when:
            self.inside = True
            self.other()
            self.inside = False

    def delete(self, name: str) -> None:
        self._now()
        super().delete(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self._now()
        return super().put_if_absent(name, data)

    def get(self, name: str) -> bytes:
        self._now()
        return super().get(name)

    def exists(self, name: str) -> bool:
        self._now()
        return super().exists(name)

    def list(self, prefix: str = "") -> list[str]:
        self._now()
        return super().list(prefix)


@pytest.mark.parametrize("whole_cache", [False, True])
@pytest.mark.parametrize("writer_first", [False, True])
def test_whoever_deletes_while_another_writes_leaves_no_row_without_its_tars(
    tmp_path: Path, header: TargetHeader, whole_cache: bool, writer_first: bool
) -> None:
    """A tar of a killed job lies there for a day; one goes on with it, one deletes it."""
    made_tars, met = tars(header), 0
    for when in range(1, 14):
        root = tmp_path / f"targets-{when}"
        plain = LocalStore(root)
        TargetCache.publish(plain, header)
        for name, data in made_tars.items():
            plain.put(f"{name}/{REF.name}", data)
        listed = [Dated(f"{name}/{REF.name}", 1, 1.0) for name in made_tars]

        def write(store: LocalStore) -> None:
            TargetCache(store, header).publish_shard(REF, KEYS, made_tars)

        def delete(store: LocalStore, listed: list[Dated] = listed) -> None:
            if whole_cache:
                delete_cache(store, [HEADER, *(one.name for one in listed)])
            else:
                delete_orphans(store, listed)

        first, second = (write, delete) if writer_first else (delete, write)
        store = Meeting(root, when, partial(second, plain))
        first(store)
        met += store.count >= when
        if finished_shards(plain):
            missing = [name for name in made_tars if not plain.exists(f"{name}/{REF.name}")]
            assert missing == [], f"at operation {when}"
    assert met >= 4


def test_a_writer_whose_tars_are_always_deleted_gives_up(
    cache: TargetCache, header, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "exists", lambda *_args: False)
    with pytest.raises(DataError, match=r"shard 'persons-000000\.tar'.*deleted as soon as"):
        cache.publish_shard(REF, KEYS, tars(header))
    monkeypatch.undo()
    assert cache.finished() == set()
