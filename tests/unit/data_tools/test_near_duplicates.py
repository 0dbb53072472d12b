"""Near duplicates: exactly the greedy rule, whatever the order; found in shards; split apart."""

import io
import json
import random
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools import near_duplicates
from data_tools.near_duplicates import find_alike
from data_tools.shard import read_shard
from data_tools.storage import LocalStore
from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

Row = tuple[str, int, int]  # key, pixels, look


def found(rows: list[Row], distance: int) -> dict[str, tuple[str, int]]:
    db = sqlite3.connect("", isolation_level=None)
    db.execute("CREATE TABLE looks(key TEXT, pixels INT, look INT)")
    signed = [(key, pixels, look - 2**64 if look >> 63 else look) for key, pixels, look in rows]
    db.executemany("INSERT INTO looks VALUES(?, ?, ?)", signed)
    result = {one.key: (one.kept, one.distance) for one in find_alike(db, distance)}
    db.close()
    return result


def greedy(rows: list[Row], distance: int) -> dict[str, set[str]]:
    """All pairs compared, from best to worst: what is left out, and all it may name as better."""
    kept: list[Row] = []
    out: dict[str, set[str]] = {}
    for row in sorted(rows, key=lambda r: (-r[1], r[0])):
        alike = {other[0] for other in kept if bin(row[2] ^ other[2]).count("1") <= distance}
        if alike:
            out[row[0]] = alike
        else:
            kept.append(row)
    return out


def made_rows(seed: int, count: int) -> list[Row]:
    """Looks in clusters, in chains and alone."""
    rng = random.Random(seed)
    looks = [rng.getrandbits(64) for _ in range(count // 4 + 1)]
    while len(looks) < count:
        look = rng.choice(looks)
        for _ in range(rng.randrange(6)):
            look ^= 1 << rng.randrange(64)
        looks.append(look)
    return [(f"{i:04d}", rng.choice([10, 20, 30]), look) for i, look in enumerate(looks)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 90), st.integers(1, 8))
def test_what_is_left_out_is_what_comparing_all_pairs_leaves_out(
    seed: int, count: int, distance: int
) -> None:
    rows = made_rows(seed, count)
    expected, result = greedy(rows, distance), found(rows, distance)
    assert result.keys() == expected.keys()
    looks = {key: look for key, _pixels, look in rows}
    for key, (kept, differing) in result.items():
        assert kept in expected[key]
        assert differing == bin(looks[key] ^ looks[kept]).count("1") <= distance


def test_the_order_of_rows_and_the_size_of_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = made_rows(3, 300)
    first = found(rows, 4)
    monkeypatch.setattr(near_duplicates, "ROWS", 7)
    random.Random(1).shuffle(rows)
    assert found(rows, 4) == first
    assert len(first) > 50


def test_a_hundred_thousand_looks_need_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    looks[50_000] = looks[17] ^ np.uint64(0b1011)
    compared = []
    count = np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda x: (compared.append(len(x)), count(x))[1])
    rows = [(f"{i:06d}", 1, int(look)) for i, look in enumerate(looks)]
    assert found(rows, 3) == {"050000": ("000017", 3)}
    assert sum(compared) < 100_000 * 10


def picture(seed: int, size: tuple[int, int] = (96, 48)) -> Image.Image:
    """Large random blobs: unlike one another, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def write(path: Path, image: Image.Image, kind: str = "JPEG", **how: int) -> None:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def keys_and_names(folder: Path) -> dict[str, str]:
    from data_tools.manifest import load_manifest

    store, told = LocalStore(folder), {}
    for ref in load_manifest(store).shards:
        shard = read_shard(store, ref, None)
        told |= {key: shard.meta(row)["source"] for row, key in enumerate(shard.keys)}
    return told


def test_of_images_that_look_alike_the_largest_stays_and_rejects_name_it(tmp_path: Path) -> None:
    for seed in range(12):
        write(tmp_path / "a" / f"{seed}.jpg", picture(seed), quality=95)
    write(tmp_path / "b" / "large.jpg", picture(3).resize((96, 192)), quality=90)
    write(tmp_path / "b" / "worse.jpg", picture(5), quality=40)
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    policy = Data(images=("unused",), samples_per_shard=4)
    everything = build_shards(sources, str(tmp_path / "off"), policy, Storage())
    assert (everything.num_samples, everything.rejected) == (14, ())
    seeking = policy.model_copy(update={"near_duplicates": 4})
    manifest = build_shards(sources, str(tmp_path / "on"), seeking, Storage())
    assert dict(manifest.rejected) == {"near_duplicate": 2}
    told = keys_and_names(tmp_path / "on")
    names = set(told.values())
    assert names >= {f"{seed}.jpg" for seed in range(12)} - {"3.jpg", "5.jpg"} | {"large.jpg"}
    assert len(names & {"5.jpg", "worse.jpg"}) == 1
    text = (tmp_path / "on" / "rejects.jsonl").read_text()
    for row in map(json.loads, text.splitlines()):
        kept = next(word for word in row["detail"].replace(",", "").split() if word in told)
        assert told[kept] in {"3.jpg": ("large.jpg",)}.get(
            Path(row["source"]).name, ("5.jpg", "worse.jpg")
        )
    swapped = build_shards(sources[::-1], str(tmp_path / "swapped"), seeking, Storage())
    assert swapped == manifest
