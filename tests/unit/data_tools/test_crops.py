"""Persons cut out of pictures, and pictures encoded anew: pixels, bytes, facts, orientation."""

import csv
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.cutting import made, sample_bytes
from data_tools.manifest import Manifest
from data_tools.policy import Kept, Refused, judge
from data_tools.shard import read_shard
from data_tools.source import Item
from data_tools.storage import LocalStore
from data_tools.tar import MAX_MEMBERS
from dpal.base.config import validate
from dpal.base.errors import ConfigError
from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

POLICY = Data(images=("persons.csv",), min_side=4, margin=0.0)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture that JPEG keeps almost as it is, and no two parts of which are alike."""
    y, x = np.mgrid[:height, :width]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(x / (11 + c) + phases[c]) + np.cos(y / (7 + c)) for c in range(3)]
    return np.stack([127 + 60 * wave for wave in waves], axis=2).astype(np.uint8)


def encoded(pixels: np.ndarray[Any, np.dtype[np.uint8]], kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **how)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def one(contents: bytes, data: Data, box: Any = None, **facts: Any) -> Kept | Refused:
    (verdict,) = judge(contents, [Item("p#0", "p", len(contents), "", box, facts)], data)
    return verdict


def with_policy(**values: Any) -> Data:
    return POLICY.model_copy(update=values)


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_its_box_and_margin_cut_at_the_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = smooth(80, 120, seed)
    left, top = rng.uniform(-20, 80), rng.uniform(-20, 50)
    box = (left, top, left + rng.uniform(30, 60), top + rng.uniform(30, 60))
    margin = float(rng.choice([0.0, 0.1, 0.5]))
    data = with_policy(margin=margin)
    kept = one(encoded(pixels), data, box)
    width, height = box[2] - box[0], box[3] - box[1]
    x0 = max(0, int(np.floor(box[0] - margin * width)))
    y0 = max(0, int(np.floor(box[1] - margin * height)))
    x1 = min(120, int(np.ceil(box[2] + margin * width)))
    y1 = min(80, int(np.ceil(box[3] + margin * height)))
    expected = pixels[y0:y1, x0:x1]
    assert isinstance(kept, Kept)
    assert (kept.kind, kept.height, kept.width) == ("jpg", *expected.shape[:2])
    contents = sample_bytes(encoded(pixels), box, data)
    assert len(contents) == kept.size
    difference = np.abs(decoded(contents) - expected)
    assert (difference.mean() < 1.5, difference.max() < 16) == (True, True)
    (moved,) = json.loads(kept.facts)["boxes"]
    inside = [max(box[0], 0) - x0, max(box[1], 0) - y0]
    assert moved[:2] == pytest.approx(inside, abs=0.006)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_of_turned_pictures_are_upright_and_whole_ones_stay_untouched(
    orientation: int,
) -> None:
    upright = smooth(64, 96)
    # What a camera stores, so that applying the orientation gives `upright` (TIFF tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    contents = encoded(np.ascontiguousarray(stored), "JPEG", quality=98, subsampling=0, exif=exif)
    assert np.abs(decoded_upright(contents) - upright).mean() < 2  # the table above is right
    whole = one(contents, POLICY)
    assert isinstance(whole, Kept)
    assert (whole.height, whole.width, whole.size) == (64, 96, len(contents))
    assert sample_bytes(contents, None, POLICY) == contents
    crop = sample_bytes(contents, (10, 20, 70, 60), POLICY)
    assert np.abs(decoded(crop) - upright[20:60, 10:70]).mean() < 2
    again = sample_bytes(contents, None, with_policy(encode="jpeg", jpeg_quality=98))
    assert Image.open(io.BytesIO(again)).getexif().get(274, 1) == 1
    assert np.abs(decoded(again) - upright).mean() < 3


def decoded_upright(contents: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
    return np.asarray(picture.convert("RGB")).astype(np.int64)


def test_the_same_crop_is_the_same_bytes_and_all_of_a_picture_are_one_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from data_tools import policy

    decodes = []
    decode = policy.decode_rgb

    def counting(data: bytes, max_pixels: int):
        decodes.append(1)
        return decode(data, max_pixels)

    monkeypatch.setattr(policy, "decode_rgb", counting)
    contents = encoded(smooth(90, 90), "JPEG")
    boxes = [(0.0, 0.0, 40.0, 40.0), (20.5, 10.0, 60.0, 80.0), (0.0, 0.0, 40.0, 40.0)]
    items = [Item(f"p#{i}", "p", 1, "", box, {"n": i}) for i, box in enumerate(boxes)]
    verdicts = judge(contents, items, POLICY)
    assert len(decodes) == 1
    keys = [verdict.key for verdict in verdicts if isinstance(verdict, Kept)]
    assert keys[0] == keys[2] != keys[1]
    assert [policy.key_of(sample_bytes(contents, box, POLICY)) for box in boxes] == keys


def test_facts_of_a_crop_are_in_its_own_pixels() -> None:
    facts = {
        "identity": "7",
        "boxes": [[20, 10, 50, 70]],
        "keypoints": [[[30, 20, 2], [0, 0, 0]]],
        "masks": [[[20, 10, 50, 10, 50, 70]]],
    }
    kept = one(encoded(smooth(80, 100)), POLICY, (20, 10, 50, 70), **facts)
    assert isinstance(kept, Kept)
    told = json.loads(kept.facts)
    assert told["identity"] == "7"
    assert told["boxes"] == [[0, 0, 30, 60]]
    assert told["keypoints"][0][0] == [10, 10, 2]
    assert told["masks"] == [[[0, 0, 30, 0, 30, 60]]]


def test_max_side_scales_a_picture_and_its_facts_and_keeps_the_aspect() -> None:
    data = with_policy(encode="jpeg", jpeg_quality=95, max_side=60)
    pixels = smooth(80, 120)
    facts = {"boxes": [[30, 20, 90, 60]], "keypoints": [[[60, 40, 2]]], "masks": [None]}
    kept = one(encoded(pixels), data, None, **facts)
    assert isinstance(kept, Kept)
    assert (kept.height, kept.width) == (40, 60)
    told = json.loads(kept.facts)
    assert told["boxes"] == [[15, 10, 45, 30]]
    assert told["keypoints"] == [[[30, 20, 2]]]
    halved = pixels.reshape(40, 2, 60, 2, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(decoded(sample_bytes(encoded(pixels), None, data)) - halved).mean() < 3
    small = one(encoded(smooth(30, 60)), data)
    assert isinstance(small, Kept)
    assert (small.height, small.width) == (30, 60)


def test_persons_of_a_scene_whose_boxes_are_not_in_it_are_left_out() -> None:
    facts = {"boxes": [[0, 0, 9, 9], [200, 0, 300, 9]], "persons": [{"n": 1}, {"n": 2}], "tag": [8]}
    kept = one(encoded(smooth(80, 100)), POLICY, None, **facts)
    assert isinstance(kept, Kept)
    assert json.loads(kept.facts) == {"boxes": [[0, 0, 9, 9]], "persons": [{"n": 1}], "tag": [8]}


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((200, 0, 300, 50), "outside"),
        ((-50, 0, 0, 50), "outside"),
        ((0, 0, float("nan"), 50), "outside"),
        ((50, 0, 20, 50), "outside"),
        ((-1e308, 0, 1e308, 50), "outside"),
        ((10, 10, 12.5, 50), "undersized"),
    ],
)
def test_boxes_without_a_person_to_see_are_rejected(box: Any, reason: str) -> None:
    refused = one(encoded(smooth(80, 100)), POLICY, box)
    assert isinstance(refused, Refused)
    assert refused.reason == reason
    if reason == "outside":
        assert made(smooth(80, 100), box, {}, POLICY) is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_side": 256}, "data.max_side has no effect with data.encode=keep"),
        ({"jpeg_quality": 80}, "data.jpeg_quality has no effect with data.encode=keep"),
        ({"encode": "jpeg", "max_side": 16}, "data.max_side=16 is below data.min_side=32"),
        ({"near_duplicates": 9}, "near_duplicates"),
        ({"samples_per_shard": MAX_MEMBERS // 2 + 1}, "samples_per_shard"),  # image and JSON
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
    ids=str,
)
def test_settings_without_effect_or_sense_are_refused(values: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(Data, {"images": ["x"], **values}, "data")


def write_table(folder: Path) -> Path:
    """Six pictures of two persons each, and the table that says where they are."""
    rows = []
    for seed in range(6):
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / f"{seed}.png").write_bytes(encoded(smooth(90, 120, seed)))
        for number, left in enumerate((5, 60)):
            rows.append([f"pictures/{seed}.png", left, 10, left + 40, 80, f"id{seed}", number])
    with (folder / "persons.csv").open("w", newline="") as file:
        names = ["file", "left", "top", "right", "bottom", "identity", "camera"]
        csv.writer(file).writerows([names, *rows])
    return folder / "persons.csv"


def metas(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    store = LocalStore(folder)
    shards = [read_shard(store, ref, None) for ref in manifest.shards]
    return [shard.meta(row) for shard in shards for row in range(len(shard))]


def test_a_table_of_persons_becomes_crops_with_their_facts(tmp_path: Path) -> None:
    table = write_table(tmp_path / "in")
    policy = Data(images=("persons.csv",), samples_per_shard=5)
    manifest = build_shards([str(table)], str(tmp_path / "out"), policy, Storage())
    assert [ref.num_samples for ref in manifest.shards] == [5, 5, 2]
    told = metas(tmp_path / "out", manifest)
    assert sorted(meta["identity"] for meta in told) == [f"id{seed // 2}" for seed in range(12)]
    assert {(meta["height"], meta["width"]) for meta in told} == {(84, 48)}
    assert all(len(meta["boxes"]) == 1 for meta in told)
    again = build_shards([str(table)], str(tmp_path / "two"), policy, Storage())
    assert again == manifest


def test_shards_made_with_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    table = write_table(tmp_path / "in")
    policy = Data(images=("persons.csv",), samples_per_shard=5)
    build_shards([str(table)], str(tmp_path / "out"), policy, Storage())
    from dpal.base.errors import DataError

    for values in ({"margin": 0.2}, {"encode": "jpeg"}, {"samples_per_shard": 4}):
        other = policy.model_copy(update=values)
        with pytest.raises(DataError, match="already holds shards of other images"):
            build_shards([str(table)], str(tmp_path / "out"), other, Storage())


def test_spooled_or_made_again_a_crop_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools import cutting, ledger, policy
    from data_tools.spool import Spool

    decodes = []

    def counted(module: ModuleType, name: str) -> None:
        decode = getattr(module, name)

        def counting(*args: object) -> object:
            decodes.append(1)
            return decode(*args)

        monkeypatch.setattr(module, name, counting)

    counted(policy, "decode_rgb")  # of all persons of a picture
    counted(cutting, "decode_region")  # of one that is made again
    table = write_table(tmp_path / "in")
    data = Data(images=("persons.csv",), samples_per_shard=5)
    first = build_shards([str(table)], str(tmp_path / "all"), data, Storage())
    assert len(decodes) == 6  # once for each picture, of two persons each
    for limit, expected in ((0, 6 + 12), (20_000, None)):
        decodes.clear()
        monkeypatch.setattr(ledger, "Spool", lambda limit=limit: Spool(limit))
        again = build_shards([str(table)], str(tmp_path / f"limit-{limit}"), data, Storage())
        assert again == first
        assert len(decodes) == expected if expected else 6 < len(decodes) < 18


def test_what_a_source_passes_over_is_counted_in_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["0002_c1s1_000451_03", "0003_c1s1_000451_03", "-1_c1s1_000401_03", "-1_c2s1_000401_03"]
    for seed, name in enumerate(names):
        (folder / f"{name}.jpg").write_bytes(encoded(smooth(60, 40, seed), "JPEG"))
    data = Data(images=("unused",), names="market1501")
    manifest = build_shards([str(folder)], str(tmp_path / "out"), data, Storage())
    assert manifest.num_samples == 2
    ((reason, count),) = manifest.rejected
    assert (reason.startswith("left out: "), count) == (True, 2)
