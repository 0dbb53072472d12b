"""The loader: the same samples on any number of ranks, after any restart; faults are told."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import load_backgrounds
from data_tools.feature_cache import TargetCache
from data_tools.loader import Loader, Slice
from data_tools.local_cache import LocalCache
from data_tools.manifest import MANIFEST, load_manifest
from data_tools.order import Order
from data_tools.sample import Sample
from data_tools.shard import read_shard
from data_tools.skips import SkipList
from data_tools.storage import LocalStore, open_store
from dpal.base.errors import DataError
from dpal.base.inputs import Data, Storage
from dpal.base.recipe import Recipe
from dpal.batch import Needs, TrainBatch
from dpal.views.plan import ViewPlan
from jobs.build_shards import build_shards

from tiny import tiny_recipe
from tiny_scenes import ARMS, arm_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path)


def loader(
    recipe: Recipe,
    part: Slice,
    cache: TargetCache | None = None,
    threads: int = 2,
    budget: int = 0,
) -> Loader:
    store = open_store(recipe.data.shards, recipe.storage)
    manifest = load_manifest(store)
    sizes = [ref.num_samples for ref in manifest.shards]
    order = Order(recipe.seed, sizes, global_batch=part.global_batch, lanes=48, window=2)
    renderer = AlignedSamples(
        manifest,
        ViewPlan(recipe.seed, recipe.views),
        load_backgrounds(recipe),
        Needs(crops=True, composite=True, boxes=recipe.loss.relation_level == "instances"),
        () if cache is None else (cache,),
        shards_at_once=order.shards_at_once(part.world_size),
    )
    return Loader(
        store,
        manifest,
        order,
        renderer,
        part,
        skips=SkipList(budget, recipe.run_dir / "skipped.jsonl"),
        max_pixels=recipe.data.max_pixels,
        threads=threads,
        prefetch=2,
    )


def read(
    recipe: Recipe, part: Slice, start: int, count: int, threads: int = 2, budget: int = 0
) -> list[TrainBatch]:
    batches = loader(recipe, part, threads=threads, budget=budget).batches(start)
    found = list(islice(batches, count))
    batches.close()
    return found


def test_two_ranks_read_what_one_rank_reads(recipe: Recipe) -> None:
    alone = read(recipe, Slice(8, 8, 0, 1), 0, 12)  # past the end of the first epoch
    halves = [read(recipe, Slice(8, 4, rank, 2), 0, 12, threads=1) for rank in range(2)]
    for whole, first, second in zip(alone, *halves, strict=True):
        assert whole.keys == first.keys + second.keys
        for name in ("base", "crops", "composite", "photometric"):
            joined = np.concatenate([getattr(first, name), getattr(second, name)])
            assert np.array_equal(getattr(whole, name), joined), name


@pytest.mark.parametrize("arm", ARMS)
def test_two_ranks_read_the_same_composites_boxes_and_noise(tmp_path: Path, arm: str) -> None:
    recipe = arm_recipe(tmp_path, arm)
    alone = read(recipe, Slice(8, 8, 0, 1), 0, 6)  # past the end of the first epoch
    halves = [read(recipe, Slice(8, 4, rank, 2), 0, 6, threads=1) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        for name in ("composite", "photometric"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(getattr(whole, name), joined), name
        if arm == "instances":
            counts = np.concatenate([part.boxes.counts for part in parts])
            assert np.array_equal(whole.boxes.counts, counts)
            rows = [row for part in parts for row in part.boxes.corners]
            for own, row, count in zip(whole.boxes.corners, rows, counts, strict=True):
                assert np.array_equal(own[:count], row[:count])
                assert not own[count:].any()


def test_pinned_noise_returns_with_its_view_while_that_of_crops_is_fresh(tmp_path: Path) -> None:
    batches = read(arm_recipe(tmp_path, "pinned"), Slice(8, 8, 0, 1), 0, 15)  # three epochs
    seen: dict[str, list[tuple[bytes, np.ndarray]]] = {}
    for batch in batches:
        for key, view, noise in zip(batch.keys, batch.base, batch.photometric, strict=True):
            seen.setdefault(key, []).append((view.tobytes(), noise))
    for views in seen.values():
        # Two views in three epochs: one of them was seen twice.
        pixels = [view for view, _noise in views]
        a, b = next((i, j) for j in range(3) for i in range(j) if pixels[i] == pixels[j])
        assert np.array_equal(views[a][1][:2], views[b][1][:2])
        assert not np.array_equal(views[a][1][2:], views[b][1][2:])
        other = 3 - a - b
        assert not np.array_equal(views[a][1][0], views[other][1][0])


def test_composites_of_two_images_need_shards_of_two(tmp_path: Path) -> None:
    recipe = arm_recipe(tmp_path, "two", data={"samples_per_shard": 39})  # 39 and 1
    with pytest.raises(DataError, match=r"alone in its shard.*data\.samples_per_shard"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_resume_twice_yields_the_same_batches(recipe: Recipe) -> None:
    through = read(recipe, Slice(8, 4, 0, 1), 0, 14)  # two micro-batches a step
    resumed = [
        *read(recipe, Slice(8, 4, 0, 1), 0, 6),
        *read(recipe, Slice(8, 4, 0, 1), 3, 4, threads=4),
        *read(recipe, Slice(8, 4, 0, 1), 5, 4, threads=1),
    ]
    assert [batch.keys for batch in through] == [batch.keys for batch in resumed]
    assert all(
        np.array_equal(a.base, b.base) and np.array_equal(a.crops, b.crops)
        for a, b in zip(through, resumed, strict=True)
    )


def keys_of(recipe: Recipe, steps: range, ranks: int, micro: int, threads: int) -> list[str]:
    """Keys of global batches of 24, as `ranks` ranks read them; each starts anew at `steps`."""
    parts = [Slice(24, micro, rank, ranks) for rank in range(ranks)]
    count = 24 // ranks // micro
    read_by = [read(recipe, part, steps.start, len(steps) * count, threads) for part in parts]
    return [
        key
        for step in range(len(steps))
        for batches in read_by
        for batch in batches[step * count : (step + 1) * count]
        for key in batch.keys
    ]


def test_the_sequence_survives_restarts_at_any_world_size_and_number_of_threads(
    recipe: Recipe,
) -> None:
    whole = keys_of(recipe, range(12), 1, 24, 2)
    pieces = [
        (range(3), 2, 12, 0),
        (range(3, 4), 3, 4, 4),  # with accumulation
        (range(4, 5), 4, 6, 1),
        (range(5, 8), 6, 4, 0),
        (range(8, 10), 8, 1, 4),
        (range(10, 12), 1, 8, 4),
    ]
    assert [key for piece in pieces for key in keys_of(recipe, *piece)] == whole


class CountedStore:
    """A store behind a network: whatever is read is fetched, and counted."""

    def __init__(self, folder: str) -> None:
        self._store, self.url = LocalStore(Path(folder)), "counted://"
        self.fetched: Counter[str] = Counter()

    def get(self, name: str) -> bytes:
        self.fetched[name] += 1
        return self._store.get(name)


class KeysAlone:
    """A renderer that looks at nothing; the batch that it fills is itself."""

    def __init__(self, size: int = 0) -> None:
        self.keys: Sequence[str] = [""] * size
        self.forgotten = False

    def expect(self, shard: int) -> None:
        """Nothing else of a shard is needed."""

    def forget(self) -> None:
        """So nothing is waited for."""
        self.forgotten = True

    def start(self, size: int) -> "KeysAlone":
        return KeysAlone(size)

    def fill(self, row: int, sample: Sample) -> None:
        self.keys[row] = sample.key

    def finish(self) -> "KeysAlone":
        return self


def noise_shards(folder: Path, count: int, per_shard: int) -> Path:
    """Shards of small pictures of noise."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:04d}.png")
    shards = folder / "shards"
    data = Data(images=(str(folder / "images"),), samples_per_shard=per_shard)
    build_shards(data.images, str(shards), data, Storage())
    return shards


def test_nodes_fetch_every_shard_once_an_epoch_but_for_those_that_a_cut_goes_through(
    tmp_path: Path,
) -> None:
    shards, nodes, epochs, per_shard = noise_shards(tmp_path, 485, 5), 2, 10, 5
    manifest = load_manifest(LocalStore(shards))
    store = CountedStore(str(shards))
    sizes = [ref.num_samples for ref in manifest.shards]
    order = Order(0, sizes, global_batch=24, lanes=8, window=1)
    keys: Counter[str] = Counter()
    for node in range(nodes):
        # Room for what is read at a time, far from room for all.
        copies = LocalCache(tmp_path / f"node-{node}", 16 * manifest.shards[0].num_bytes)
        skips = SkipList(0, tmp_path / "skipped.jsonl")
        renderer = KeysAlone()
        batches = Loader(
            store,  # type: ignore[arg-type]
            manifest,
            order,
            renderer,
            Slice(24, 12, node, nodes),
            skips=skips,
            max_pixels=10**6,
            threads=0,
            prefetch=0,
            copies=copies,
        ).batches(0)
        for _ in range(epochs * 485 // 24):
            keys.update(next(batches).keys)
        batches.close()
        assert renderer.forgotten
    assert len(keys) == 485
    assert {*keys.values()} <= {epochs - 1, epochs}
    assert len(sizes) == -(-485 // per_shard)
    # A cut adds a fetch, a copy that is still there from the last epoch saves one.
    assert sum(store.fetched.values()) <= epochs * len(sizes)


def break_image(shards: Path, name: str, row: int) -> str:
    """Make one image of a shard undecodable, but leave the shard and its manifest in agreement."""
    store = LocalStore(shards)
    manifest = load_manifest(store)
    (ref,) = (ref for ref in manifest.shards if ref.name == name)
    shard = read_shard(store, ref, None)
    image, data = shard.image_bytes(row), store.get(name)
    broken = data.replace(image, bytes(len(image)))
    (shards / name).write_bytes(broken)
    changed = ref._replace(sha256=hashlib.sha256(broken).hexdigest())
    refs = tuple(changed if each == ref else each for each in manifest.shards)
    store.put(MANIFEST, replace(manifest, shards=refs).to_json().encode())
    return shard.keys[row]


def test_a_damaged_sample_is_skipped_listed_and_replaced_within_the_budget(recipe: Recipe) -> None:
    sound = read(recipe, Slice(8, 8, 0, 1), 0, 10)  # two epochs
    key = break_image(Path(recipe.data.shards), "persons-000001.tar", 3)
    batches = read(recipe, Slice(8, 4, 0, 1), 0, 20, budget=1)
    before = [key for batch in sound for key in batch.keys]
    after = [key for batch in batches for key in batch.keys]
    changed = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    assert [was for was, _now in changed] == [key, key]
    assert all(now in before for _was, now in changed)
    lines = (recipe.run_dir / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [(row["key"], row["shard"]) for row in listed] == [(key, "persons-000001.tar")] * 2
    assert {row["epoch"] for row in listed} == {0, 1}
    assert [row["stand_in"] for row in listed] == [now for _was, now in changed]


def test_more_damage_than_the_budget_allows_stops_the_run(recipe: Recipe) -> None:
    shards = Path(recipe.data.shards)
    first = break_image(shards, "persons-000001.tar", 3)
    second = break_image(shards, "persons-000002.tar", 0)
    with pytest.raises(DataError, match=r"2 damaged samples .* data\.max_skip_fraction") as found:
        read(recipe, Slice(8, 8, 0, 1), 0, 5, budget=1)
    listed = (recipe.run_dir / "skipped.jsonl").read_text()
    assert first in listed
    assert second in listed
    assert first in str(found.value) or second in str(found.value)


def test_of_a_damaged_shard_the_sound_samples_are_used_within_the_budget(recipe: Recipe) -> None:
    sound = read(recipe, Slice(8, 8, 0, 1), 0, 5)
    path = Path(recipe.data.shards) / "persons-000002.tar"
    (ref,) = (r for r in load_manifest(LocalStore(path.parent)).shards if r.name == path.name)
    shard, data = read_shard(LocalStore(path.parent), ref, None), path.read_bytes()
    at = data.index(shard.image_bytes(4)) + 700  # in the pixels: it might even decode
    path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    batches = read(recipe, Slice(8, 8, 0, 1), 0, 5, budget=1)
    before = [key for batch in sound for key in batch.keys]
    after = [key for batch in batches for key in batch.keys]
    assert set(before) - set(after) == {shard.keys[4]}
    listed = (recipe.run_dir / "skipped.jsonl").read_text()
    assert shard.keys[4] in listed
    assert "digest" in listed


def test_a_sample_that_is_skipped_for_its_partner_in_a_composite_says_so(tmp_path: Path) -> None:
    """A sound sample used to be listed with the damage of another one."""
    recipe = arm_recipe(tmp_path, "two")
    key = break_image(Path(recipe.data.shards), "persons-000001.tar", 3)
    read(recipe, Slice(8, 8, 0, 1), 0, 15, budget=10)  # three epochs
    lines = (recipe.run_dir / "skipped.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    others = [row for row in rows if row["key"] != key]
    assert others
    assert len(others) < len(rows)
    for row in rows:
        assert row["reason"].startswith(f"its partner {key!r}") == (row["key"] != key), row


def test_closing_the_batches_stops_every_thread(recipe: Recipe) -> None:
    read(recipe, Slice(8, 8, 0, 1), 0, 3)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("decode")]


def test_an_epoch_holds_every_key_once_and_the_next_one_is_shuffled_anew(recipe: Recipe) -> None:
    keys = [key for batch in read(recipe, Slice(8, 8, 0, 1), 0, 10) for key in batch.keys]
    first, second = keys[:40], keys[40:]
    assert len(set(first)) == 40
    assert sorted(first) == sorted(second)
    assert first != second


def test_local_crops_are_fresh_in_every_epoch_but_base_views_return(recipe: Recipe) -> None:
    batches = read(recipe, Slice(8, 8, 0, 1), 0, 15)  # three epochs of five steps
    rows = {}
    for step, batch in enumerate(batches):
        for i, key in enumerate(batch.keys):
            rows.setdefault(key, []).append((step // 5, batch.base[i], batch.crops[i]))
    views = [value for value in rows.values() if len(value) == 3]
    assert views
    assert all(not np.array_equal(a[2], c[2]) for a, _, c in views)
    # With two views per image, the view of epoch 2 is that of epoch 0 or of epoch 1.
    assert all(np.array_equal(c[1], a[1]) or np.array_equal(c[1], b[1]) for a, b, c in views)


def test_a_damaged_shard_stops_the_run_and_is_named(recipe: Recipe) -> None:
    shard = Path(recipe.data.shards) / "persons-000002.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match="persons-000002"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_a_missing_shard_stops_the_run_and_is_named(recipe: Recipe) -> None:
    (Path(recipe.data.shards) / "persons-000001.tar").unlink()
    with pytest.raises(DataError, match="persons-000001"):
        read(recipe, Slice(8, 8, 0, 1), 0, 5)


def test_a_target_cache_of_other_images_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    from jobs.caching.plan import cache_of

    from tiny import fill_cache

    fill_cache(recipe)
    store = LocalStore(Path(recipe.data.shards))
    manifest = load_manifest(store)
    cache = cache_of(recipe, manifest, load_backgrounds(recipe))
    other = replace(
        manifest, shards=tuple(ref._replace(keys_digest="0" * 64) for ref in manifest.shards)
    )
    with pytest.raises(DataError, match="other images"):
        cache.shard("view-0", other.shards[0])
