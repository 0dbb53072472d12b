"""Records and header: what is written comes back, damage and mismatch are told."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpal.base.errors import DataError
from dpal.base.inputs import Views
from dpal.calibration import fit_header
from dpal.record import damaged_rows, spec_numbers, spec_of
from dpal.targets.coding import decode_batch, encode_batch
from dpal.targets.header import TargetHeader
from dpal.views.plan import ViewPlan
from dpal.views.specs import Box, ViewSpec

from made_targets import DEFINITION, GRID

WIDTH = 48


def tokens(count: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ViT-like tokens: two outlier channels, and one channel that marks the person."""
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(count, *GRID, WIDTH)).astype(np.float32)
    patches[..., 5] += 60
    patches[..., 7] *= 30
    patches[:, 2:6, 1:3, 9:20] += 25  # the person stands in the middle
    cls = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return cls, patches.reshape(count, -1, WIDTH)


def header(codec: str = "int8") -> TargetHeader:
    cls, patches = tokens()
    return fit_header(replace(DEFINITION, codec=codec), cls, patches, ["k"] * 16)


def encoded(head: TargetHeader, cls: np.ndarray, patches: np.ndarray) -> np.ndarray:
    specs = np.stack([spec_numbers(ViewSpec(Box(1, 2, 3, 4), True))] * len(cls))
    return encode_batch(cls, patches, specs, head, "view")


@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.012), ("fp16", 5e-4), ("fp32", 0.0)])
def test_tokens_come_back_within_the_codecs_step(codec: str, bound: float) -> None:
    head = header(codec)
    cls, patches = tokens(5, seed=1)
    decoded = decode_batch(encoded(head, cls, patches), head, "view")
    error = (decoded.patches.numpy() - patches) / head.patch_std
    assert np.sqrt(np.mean(error**2)) <= bound
    assert np.abs(decoded.cls.numpy() - cls).max() <= (0 if codec == "fp32" else 2e-3)


def test_an_outlier_channel_does_not_cost_the_others_their_precision() -> None:
    head = header()
    cls, patches = tokens(5, seed=1)
    decoded = decode_batch(encoded(head, cls, patches), head, "view").patches.numpy()
    plain = np.delete(np.arange(WIDTH), [5, 7])
    error = ((decoded - patches) / head.patch_std)[..., plain]
    assert np.sqrt(np.mean(error**2)) < 0.012


def test_a_constant_channel_and_a_mean_token_survive_int8() -> None:
    cls, patches = tokens()
    patches[..., 3] = 4.5
    head = fit_header(DEFINITION, cls, patches, ["k"] * 16)
    one = np.broadcast_to(head.patch_mean, (1, 32, WIDTH)).astype(np.float32)
    decoded = decode_batch(encoded(head, cls[:1], one), head, "view")
    np.testing.assert_allclose(decoded.patches.numpy(), one, rtol=1e-5)


def test_every_flipped_bit_is_found() -> None:
    head = header()
    records = encoded(head, *tokens(4, seed=2))
    layout = head.layout("view")
    assert damaged_rows(records, layout) == []
    for byte in (0, layout.cls_start, layout.scale_start, layout.code_start, layout.crc_start):
        hurt = records.copy()
        hurt[2, byte] ^= 16
        assert damaged_rows(hurt, layout) == [2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("where", ["cls", "patches"])
def test_tokens_that_do_not_fit_are_refused(bad: float, where: str) -> None:
    head = header("fp16")
    cls, patches = tokens(2)
    (cls if where == "cls" else patches)[1, 3] = bad
    with pytest.raises(DataError, match="codec=fp32"):
        encoded(head, cls, patches)


def test_records_of_another_kind_are_refused() -> None:
    head = header()
    with pytest.raises(DataError, match="accepted is uint8"):
        decode_batch(encoded(head, *tokens(2)), head, "composite")


def test_specs_are_written_as_explicit_numbers() -> None:
    plan = ViewPlan(3, Views(height=128, width=64))
    specs = [plan.base("k", 1, (300, 200)), plan.composite("k", 0, (300, 200), [(99, 88)] * 7)]
    assert [spec_of(spec_numbers(spec)) for spec in specs] == specs
    with pytest.raises(DataError, match="65535"):
        spec_numbers(ViewSpec(Box(0, 0, 70000, 2), False))


def test_header_survives_json_exactly() -> None:
    head = header()
    again = TargetHeader.from_json(head.to_json())
    assert again.to_json() == head.to_json()
    assert again.direction.dtype == np.float32
    np.testing.assert_array_equal(again.patch_std, head.patch_std)


def test_an_edited_or_cut_header_is_refused() -> None:
    plain = json.loads(header().to_json())
    plain["definition"]["codec"] = "fp16"
    with pytest.raises(DataError, match="digest"):
        TargetHeader.from_json(json.dumps(plain).encode())
    with pytest.raises(DataError, match="damaged"):
        TargetHeader.from_json(header().to_json()[:-40])
    with pytest.raises(DataError, match="damaged"):
        TargetHeader.from_json(b"[" * 200_000)  # deeper than Python nests


@pytest.mark.parametrize(
    "change",
    [
        {"low": "dark"},
        {"high": None},
        {"high": float("inf")},
        {"patch_mean": [float("nan")] * WIDTH},
        {"patch_std": [0.0] * WIDTH},
        {"cls_std": [-1.0] * WIDTH},
        {"width": float(WIDTH)},
        {"patch_mean": [10**400] * WIDTH},
        {"low": 10**400},
    ],
)
def test_statistics_that_no_calibration_gives_are_refused(change: dict[str, Any]) -> None:
    plain = json.loads(header().to_json())
    with pytest.raises(DataError, match="damaged"):
        TargetHeader.from_json(json.dumps({**plain, **change}).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"name": "vit", "weights": "ab"}},
        {"views": {"seed": 1}},
        {"grid": (4, 2)},
        {"codec": "fp16"},
        {"manifest": "m2"},
        {"backgrounds": "b2"},
        {"calibration_images": 17},
        {"version": 99},
    ],
)
def test_whatever_changes_the_content_changes_the_address_and_is_named(change: dict) -> None:
    other = replace(DEFINITION, **change)
    assert other.digest != DEFINITION.digest
    assert next(iter(change)) in DEFINITION.differences(other)[0]


def test_tokens_that_say_nothing_cannot_be_calibrated() -> None:
    cls, patches = tokens()
    with pytest.raises(DataError, match="same token"):
        fit_header(DEFINITION, cls, np.ones_like(patches), ["k"] * 16)
    patches[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        fit_header(DEFINITION, cls, patches, ["k"] * 16)


def test_records_can_be_handled_without_torch() -> None:
    code = "import dpal.targets.coding, dpal.record, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
