"""Codecs: every word against a float64 restatement, its bytes, and what damages a rotation.

Legend: B records, N patches, D teacher width, C stored channels.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpal.base.codec import parse_codec
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.calibration import fit_header
from dpal.quantise import pack_nibbles, quantise, times_scales, unpack_nibbles
from dpal.record import RecordLayout
from dpal.shape_mask import mask_of
from dpal.targets.coding import decode_batch, encode_batch, stored_patches
from dpal.targets.header import TargetHeader

from made_targets import DEFINITION, GRID
from made_task import made_header

WIDTH = 64  # D: two int4 groups, and a Hadamard matrix of Sylvester's
PLAIN = ("int8", "int4", "fp16")
TURNED = ("pca40-int8", "pca40-int4", "pca40-fp16", "phis-int8", "phis-int4", "phis-fp16")
WORDS = ("fp32", *PLAIN, *TURNED)


def tokens(count: int = 12, seed: int = 0, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose variance falls off along random axes, and that mark a person in the middle."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).normal(size=(width, width)))[0]
    spread = 4 * np.arange(1, width + 1) ** -0.8
    patches = (rng.normal(size=(count, *GRID, width)) * spread) @ axes + 3
    patches[:, 2:6, 1:3] += 12 * axes[1]
    cls = rng.normal(size=(count, width))
    return cls.astype(np.float32), patches.reshape(count, -1, width).astype(np.float32)


def header(word: str) -> TargetHeader:
    cls, patches = tokens()
    return fit_header(replace(DEFINITION, codec=word), cls, patches, ["k"] * len(cls))


def encoded(head: TargetHeader, cls: np.ndarray, patches: np.ndarray) -> np.ndarray:
    return encode_batch(cls, patches, np.zeros((len(cls), 6), np.uint16), head, "view")


def turn_in_float64(word: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], forward [D, C] and backward [C, D] matrix, from the calibration tokens alone."""
    flat = tokens()[1].reshape(-1, WIDTH).astype(np.float64)
    mean, deviation = flat.mean(0), flat.std(0)
    kind = word.rpartition("-")[0]
    if word == "fp32":
        return np.zeros(WIDTH), np.eye(WIDTH), np.eye(WIDTH)
    if not kind:
        return mean, np.diag(1 / deviation), np.diag(deviation)
    left, singular, _ = np.linalg.svd((flat - mean).T / np.sqrt(len(flat)), full_matrices=False)
    variance = singular**2  # descending
    rows = left.T * np.where(left.T.max(1) > -left.T.min(1), 1, -1)[:, None]
    if kind == "phis":
        mixing = np.ones((1, 1))
        while len(mixing) < WIDTH:
            mixing = np.kron(np.array([[1, 1], [1, -1]]), mixing)
        # Columns of the Hadamard matrix belong to eigenvalues in ascending order.
        basis, scale = mixing @ rows[::-1] / np.sqrt(WIDTH), np.sqrt(variance.mean())
    else:
        rank = int(kind.removeprefix("pca"))
        mixed = np.zeros((rank, WIDTH))
        for place in range(rank):
            mixed[place] = rows[0] / np.sqrt(rank)
            for wave in range(1, rank):
                angle = np.pi * (place + 0.5) * wave / rank
                mixed[place] += rows[wave] * np.cos(angle) * np.sqrt(2 / rank)
        basis, scale = mixed, np.sqrt(variance[:rank].mean())
    return mean, basis.T / scale, basis * scale


def rounded_in_float64(values: np.ndarray, storage: str) -> np.ndarray:
    """Numbers [B, N, C] after rounding, group by group."""
    if storage.startswith("fp"):
        return values.astype(np.float16 if storage == "fp16" else np.float32).astype(np.float64)
    size, limit = (32, 7) if storage == "int4" else (values.shape[2], 127)
    result = np.zeros_like(values)
    for start in range(0, values.shape[2], size):
        part = values[:, :, start : start + size]
        scale = (np.abs(part).max(2, keepdims=True) / limit).astype(np.float16).astype(np.float64)
        result[:, :, start : start + size] = scale * np.round(part / scale)
    return result


@pytest.mark.parametrize("word", WORDS)
def test_every_codec_is_its_restatement_in_float64(word: str) -> None:
    head = header(word)
    cls, patches = tokens(4, seed=1)
    decoded = decode_batch(encoded(head, cls, patches), head, "view")
    assert decoded.patches.dtype == decoded.cls.dtype == torch.float32
    mean, forward, backward = turn_in_float64(word)
    exact = (patches - mean) @ forward
    wanted = rounded_in_float64(exact, word.rpartition("-")[2]) @ backward + mean
    error = np.square(decoded.patches.numpy() - patches).sum()
    # A number that lies on a rounding border may fall to either side; nothing else may differ.
    assert np.square(decoded.patches.numpy() - wanted).sum() <= 0.02 * error + 1e-9
    assert error == pytest.approx(np.square(wanted - patches).sum(), rel=2e-3, abs=1e-9)
    assert (error > 0) == (word != "fp32")


@pytest.mark.parametrize("word", WORDS)
def test_reading_the_bytes_by_hand_gives_the_decoded_tokens(word: str) -> None:
    """Another program's view of a record: offsets, nibbles and the JSON of the header."""
    import base64

    head, storage = header(word), word.rpartition("-")[2]
    cls, patches = tokens(3, seed=2)
    record = encoded(head, cls, patches)[1].tobytes()
    plain: dict[str, Any] = json.loads(head.to_json())
    channels = plain["rotation"]["rank"] if "rotation" in plain else WIDTH
    at = 12 + WIDTH * (4 if storage == "fp32" else 2)
    groups = {"int8": 1, "int4": -(-channels // 32)}.get(storage, 0)
    scales = np.frombuffer(record, "<f2", 32 * groups, at).reshape(32, groups)
    at += 2 * 32 * groups
    if storage == "int4":
        packed = np.frombuffer(record, np.uint8, 32 * channels // 2, at).reshape(32, -1)
        pairs = [[[int(b) % 16 - 8, int(b) // 16 - 8] for b in row] for row in packed]
        codes = np.array(pairs, dtype=np.float64).reshape(32, channels)
        at += packed.size
    else:
        kind = {"int8": "i1", "fp16": "<f2", "fp32": "<f4"}[storage]
        codes = np.frombuffer(record, kind, 32 * channels, at).astype(np.float64)
        at, codes = at + codes.size * np.dtype(kind).itemsize, codes.reshape(32, channels)
    assert at + 4 == len(record)
    size = 32 if storage == "int4" else channels
    for group in range(groups):
        codes[:, group * size : (group + 1) * size] *= scales[:, group : group + 1]
    if "rotation" in plain:
        data = base64.b64decode(plain["rotation"]["basis"])
        basis = np.frombuffer(data, "<f4").reshape(channels, WIDTH)
        codes = plain["rotation"]["scale"] * codes @ basis + plain["patch_mean"]
    elif storage != "fp32":
        codes = codes * plain["patch_std"] + plain["patch_mean"]
    decoded = decode_batch(encoded(head, cls, patches), head, "view").patches[1].numpy()
    np.testing.assert_allclose(decoded, codes, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("word", "patch_bytes"),
    [
        ("fp32", 128 * 768 * 4),
        ("fp16", 128 * 768 * 2),
        ("int8", 128 * (768 + 2)),
        ("int4", 128 * (384 + 2 * 24)),
        ("phis-int8", 128 * (768 + 2)),
        ("pca256-int8", 128 * (256 + 2)),
        ("pca256-int4", 128 * (128 + 2 * 8)),
        ("pca100-int4", 128 * (50 + 2 * 4)),
        ("pca64-fp16", 128 * 64 * 2),
    ],
)
def test_a_record_has_the_bytes_of_its_layout(word: str, patch_bytes: int) -> None:
    layout = RecordLayout("view", word, 768, 128)
    assert layout.num_bytes == 12 + 768 * (4 if word == "fp32" else 2) + patch_bytes + 4


@pytest.mark.parametrize("word", WORDS)
def test_records_are_as_long_as_the_layout_says(word: str) -> None:
    head = header(word)
    assert encoded(head, *tokens(2)).shape == (2, head.layout("view").num_bytes)


@given(
    st.integers(1, 70).flatmap(
        lambda channels: st.lists(
            st.lists(st.integers(-7, 7), min_size=channels, max_size=channels),
            min_size=1,
            max_size=3,
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_nibbles_come_back_whatever_their_number(rows: list[list[int]]) -> None:
    codes = np.array([rows], dtype=np.int8)  # [1, N, C]
    packed = pack_nibbles(codes)
    assert packed.shape == (1, len(rows), -(-codes.shape[2] // 2))
    back = unpack_nibbles(torch.from_numpy(packed), codes.shape[2])
    np.testing.assert_array_equal(back.numpy(), codes)


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 70])
def test_no_code_is_further_off_than_half_a_step(storage: str, channels: int) -> None:
    rng = np.random.default_rng(channels)
    values = (rng.standard_t(2, size=(3, 5, channels)) * 10).astype(np.float32)
    values[0, 0] = 0
    quantised = quantise(values, storage)
    limit = 127 if storage == "int8" else 7
    assert quantised.clipped == 0
    assert np.abs(quantised.codes).max() == limit
    codes, scales = (torch.from_numpy(part.astype(np.float32)) for part in quantised[:2])
    back = times_scales(codes, scales).numpy()
    size = channels if storage == "int8" else 32
    steps = np.repeat(quantised.scales.astype(np.float32), size, axis=2)[:, :, :channels]
    assert (np.abs(back - values) <= 0.5001 * steps).all()
    assert (back[0, 0] == 0).all()


def test_what_fp16_scales_cannot_hold_is_counted_as_clipped() -> None:
    values = np.full((1, 1, 64), 1e-8, dtype=np.float32)
    values[0, 0, 40] = 3.1e-7  # 7 steps of 4.4e-8, which fp16 rounds to 5.96e-8
    assert quantise(values, "int4").clipped == 0
    values[0, 0, 40] = 6e-7  # 7 steps of 8.6e-8, rounded down to 5.96e-8: code 10
    assert quantise(values, "int4").clipped == 1


@pytest.mark.parametrize(
    ("word", "digest", "records", "json_bytes"),
    [
        ("int8", "8710dd791c06d8c5", "c2679cd1c196e556", "d5ceac33f408dea3"),
        ("fp16", "df0c12d78e75ae27", "bf5617543908d582", "6c1e2743e3e3cd89"),
        ("fp32", "44366806d823d982", "f52d2a5d97476df6", "30e01191327d8273"),
    ],
)
def test_caches_of_the_first_three_codecs_keep_their_address_and_their_bytes(
    word: str, digest: str, records: str, json_bytes: str
) -> None:
    """Golden: written down before there was any other codec."""
    definition = replace(DEFINITION, codec=word)
    head = replace(made_header(48, 3), definition=definition)
    rng = np.random.default_rng(7)
    cls = rng.normal(size=(3, 48)).astype(np.float32)
    patches = (rng.normal(size=(3, 32, 48)) * 3).astype(np.float32)
    specs = rng.integers(0, 500, (3, 6)).astype(np.uint16)
    written = encode_batch(cls, patches, specs, head, "view").tobytes()
    assert definition.digest == digest
    assert hashlib.sha256(written).hexdigest()[:16] == records
    plain = json.loads(head.to_json())
    del plain["sha256"]  # headers of before have no checksum
    again = json.dumps(plain, sort_keys=True, indent=1).encode()
    assert hashlib.sha256(again).hexdigest()[:16] == json_bytes


def test_every_word_has_an_address_of_its_own() -> None:
    words = (*WORDS, "pca42-int8", "pca38-int8")
    assert len({replace(DEFINITION, codec=word).digest for word in words}) == len(words)


@pytest.mark.parametrize("word", WORDS)
def test_a_header_with_a_rotation_survives_json_exactly(word: str) -> None:
    head = header(word)
    again = TargetHeader.from_json(head.to_json())
    assert again.to_json() == head.to_json()
    cls, patches = tokens(2, seed=5)
    np.testing.assert_array_equal(encoded(again, cls, patches), encoded(head, cls, patches))
    assert ("rotation" in json.loads(head.to_json())) == (word in TURNED)


def damage(plain: dict[str, Any], how: str) -> None:
    turn = plain["rotation"]
    if how == "bit":
        turn["basis"] = ("B" if turn["basis"][0] != "B" else "C") + turn["basis"][1:]
    elif how == "cut":
        turn["basis"] = turn["basis"][:-8]
    elif how == "letters":
        turn["basis"] = "!" + turn["basis"][1:]
    elif how == "rank":
        turn["rank"] = 38
    elif how == "scale":
        turn["scale"] = -1.0
    else:
        del plain["rotation"]


@pytest.mark.parametrize("how", ["bit", "cut", "letters", "rank", "scale", "gone"])
def test_a_damaged_rotation_is_refused(how: str) -> None:
    plain = json.loads(header("pca40-int8").to_json())
    damage(plain, how)
    with pytest.raises(DataError, match="target header is damaged"):
        TargetHeader.from_json(json.dumps(plain).encode())


def test_a_rotation_that_no_codec_asks_for_is_refused() -> None:
    plain = json.loads(header("int8").to_json())
    plain["rotation"] = json.loads(header("pca40-int8").to_json())["rotation"]
    with pytest.raises(DataError, match="int8 has none"):
        TargetHeader.from_json(json.dumps(plain).encode())


@pytest.mark.parametrize("word", ["int8", "pca40-int8", "phis-int8", "int4", "pca40-int4"])
def test_the_shape_mask_hardly_notices_the_codec(word: str) -> None:
    """The mask's direction is a principal component: what PCA leaves out has no part in it."""
    head = header(word)
    cls, patches = tokens(6, seed=3)
    exact = mask_of("fixed", torch.from_numpy(patches), head)
    decoded = decode_batch(encoded(head, cls, patches), head, "view").patches
    difference = (mask_of("fixed", decoded, head) - exact).abs()
    assert exact.std() > 0.1
    assert difference.max() < (0.05 if word.endswith("int4") else 0.01)


@pytest.mark.parametrize("word", ["pca40-int8", "phis-int8"])
def test_autocast_does_not_round_a_turned_target(word: str) -> None:
    head = header(word)
    records = torch.from_numpy(encoded(head, *tokens(2)))
    plain = decode_batch(records, head, "view")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = decode_batch(records, head, "view")
    assert torch.equal(plain.patches, cast.patches)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("word", ["int4", "pca40-int8", "phis-int4"])
def test_tokens_that_do_not_fit_are_refused_after_a_turn_too(word: str, bad: float) -> None:
    head = header(word)
    cls, patches = tokens(2)
    patches[1, 3, 7] = bad
    with pytest.raises(DataError, match="codec=fp32"):
        encoded(head, cls, patches)


def test_one_scale_keeps_the_ratio_of_errors() -> None:
    """The relative error of a token is that of what is stored of it."""
    head = header("phis-int4")
    cls, patches = tokens(4, seed=6)
    decoded = decode_batch(encoded(head, cls, patches), head, "view").patches.numpy()
    stored, again = stored_patches(patches, head), stored_patches(decoded, head)
    outside = np.square(decoded - patches).sum() / np.square(patches - head.patch_mean).sum()
    inside = np.square(again - stored).sum() / np.square(stored).sum()
    assert outside == pytest.approx(inside, rel=1e-3)


def test_no_stored_number_of_pca_carries_the_strongest_component_alone() -> None:
    """Unmixed, the first component sets the step of its whole int4 group."""
    head = header("pca40-int4")
    cls, patches = tokens()
    spread = stored_patches(patches, head).std(axis=(0, 1))
    assert spread.max() < 2
    assert np.sqrt(np.mean(spread**2)) == pytest.approx(1, rel=1e-3)
    turn, axes = head.rotation, np.linalg.eigh(np.cov(patches.reshape(-1, WIDTH).T))[1][:, :-41:-1]
    assert turn is not None
    np.testing.assert_allclose(turn.basis @ turn.basis.T, np.eye(40), atol=1e-5)
    unmixed = replace(turn, basis=axes.T.astype(np.float32))
    errors = []
    for each in (head, replace(head, rotation=unmixed)):
        decoded = decode_batch(encoded(each, cls, patches), each, "view").patches.numpy()
        inside = (decoded - patches) @ axes
        errors.append(np.square(inside).sum())
    assert errors[0] < 0.7 * errors[1]


def test_pca_loses_what_it_says_it_leaves_out() -> None:
    head = header("pca16-fp16")
    cls, patches = tokens()
    decoded = decode_batch(encoded(head, cls, patches), head, "view").patches.numpy()
    lost = np.square(decoded - patches).sum() / np.square(patches - head.patch_mean).sum()
    assert head.rotation is not None
    assert 0.5 < head.rotation.kept < 1
    assert lost == pytest.approx(1 - head.rotation.kept, rel=1e-3)


@pytest.mark.parametrize(
    "word", ["zip", "pca-int8", "pca3-int8", "pca2-int8", "pca064-int8", "pca64-fp32", "int", ""]
)
def test_words_that_are_no_codec_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"cache\.codec=.*pca256-int8 or phis-int4"):
        parse_codec(word)
    with pytest.raises(ConfigError, match=r"cache\.codec='.*accepted are int8, int4"):
        resolve_recipe(
            {
                "name": "a",
                "data": {"images": ["b"]},
                "teacher": {"kind": "timm", "name": "vit_tiny_patch16_224"},
                "cache": {"codec": word},
            }
        )


@pytest.mark.parametrize("rank", [WIDTH, WIDTH + 36])
def test_a_rank_of_the_teachers_width_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"pca{rank}-int8.* 64 channels; accepted are pca4 to"):
        header(f"pca{rank}-int8")


def test_phis_of_a_width_without_hadamard_matrix_is_refused() -> None:
    cls, patches = tokens(width=50)
    with pytest.raises(ConfigError, match=r"cache\.codec=phis-int8.* 50 "):
        fit_header(replace(DEFINITION, codec="phis-int8"), cls, patches, ["k"] * 12)
