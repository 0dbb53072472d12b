"""Comparing stored targets with a teacher: every figure against plain NumPy, every bound holds."""

import zlib

import numpy as np
import pytest
import torch

from dpal.calibration import fit_header
from dpal.model.tokens import Tokens
from dpal.parity import bounds_of, compare
from dpal.record import spec_numbers
from dpal.targets.coding import encode_batch
from dpal.targets.header import TargetHeader
from dpal.views.specs import Box, ViewSpec

from made_targets import DEFINITION

D, N = 48, 32
CODECS = ("int8", "int4", "fp16", "fp32", "pca16-int8", "phis-int8", "pca16-int4")


def tokens_of(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated tokens with an outlier channel and a mean."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(D, D)) * np.linspace(1, 0.05, D)
    scale = np.ones(D)
    scale[3] = 20
    cls = rng.normal(size=(size, D)) @ mixing * scale + 2
    patches = rng.normal(size=(size, N, D)) @ mixing * scale - 1
    return cls.astype(np.float32), patches.astype(np.float32)


def header_of(codec: str) -> TargetHeader:
    cls, patches = tokens_of(1, 40)
    definition = DEFINITION.__class__(**{**vars(DEFINITION), "codec": codec})
    return fit_header(definition, cls, patches, ["key"])


def records_of(
    header: TargetHeader, cls: np.ndarray, patches: np.ndarray
) -> tuple[np.ndarray, Tokens]:
    specs = np.stack([spec_numbers(ViewSpec(Box(0, 0, 9, 9), False))] * len(cls))
    records = encode_batch(cls, patches, specs, header, "view")
    return records, Tokens(torch.from_numpy(cls), torch.from_numpy(patches))


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_just_written_is_equal_whatever_the_codec_costs(codec: str) -> None:
    header = header_of(codec)
    records, teacher = records_of(header, *tokens_of(2, 5))
    found = compare(records, teacher, header, "view", noise=0.0)
    assert found.cosines.shape == (5, 1 + N)
    assert found.codec_cosines.shape == (5, N)
    assert np.array_equal(found.cosines, np.ones((5, 1 + N)))
    assert np.array_equal(found.steps, np.zeros(5))
    assert np.array_equal(found.excess, np.zeros(5))
    if codec not in ("fp32", "fp16"):
        assert found.codec_cosines.min() < 0.99999


@pytest.mark.parametrize("codec", CODECS)
def test_noise_below_the_bounds_passes_and_another_token_does_not(codec: str) -> None:
    header = header_of(codec)
    cls, patches = tokens_of(3, 4)
    records, _ = records_of(header, cls, patches)
    rng = np.random.default_rng(0)
    near = patches + 5e-4 * header.patch_std * rng.normal(size=patches.shape).astype(np.float32)
    bounds = bounds_of(header.layout("view").storage, "fp32")
    _, teacher = records_of(header, cls, near)
    found = compare(records, teacher, header, "view", bounds.noise)
    assert found.steps.max() > 0
    assert found.excess.max() <= 1
    assert np.median(found.cosines) >= bounds.median
    assert found.cosines.min() >= bounds.smallest

    other = patches.copy()
    other[2, 7] = patches[0, 0]
    _, teacher = records_of(header, cls, other)
    found = compare(records, teacher, header, "view", bounds.noise)
    assert found.cosines.argmin() == 2 * (1 + N) + 1 + 7
    assert found.cosines.min() < bounds.smallest
    assert found.excess.argmax() == 2
    assert found.excess.max() > 1


def test_every_figure_of_int8_is_its_formula() -> None:
    header = header_of("int8")
    cls, patches = tokens_of(4, 3)
    records, _ = records_of(header, cls, patches)
    rng = np.random.default_rng(1)
    now_cls = (cls + 0.01 * rng.normal(size=cls.shape)).astype(np.float32)
    now = (patches + 0.05 * rng.normal(size=patches.shape)).astype(np.float32)
    _, teacher = records_of(header, now_cls, now)
    found = compare(records, teacher, header, "view", noise=1 / 127)

    def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.float16(np.abs(values).max(-1, keepdims=True) / 127).astype(np.float64)
        return np.clip(np.rint(values / scale), -127, 127) * scale, scale

    mean, std = np.float64(header.patch_mean), np.float64(header.patch_std)
    stored, _ = rounded((patches - mean) / std)
    again, step = rounded((now - mean) / std)
    difference, largest = np.abs(stored - again), np.abs(again).max(-1, keepdims=True)
    assert found.steps == pytest.approx((difference / step).max((1, 2)), rel=5e-3)
    accepted = (difference / (step + largest / 127)).max((1, 2))
    assert found.excess == pytest.approx(accepted, rel=5e-3)  # CLS moved by less
    cosines = (stored * again).sum(-1)
    cosines /= np.linalg.norm(stored, axis=-1) * np.linalg.norm(again, axis=-1)
    assert found.cosines[:, 1:] == pytest.approx(cosines, abs=1e-6)
    exact = (now - mean) / std
    codec = (exact * stored).sum(-1)
    codec /= np.linalg.norm(exact, axis=-1) * np.linalg.norm(stored, axis=-1)
    assert found.codec_cosines == pytest.approx(codec, abs=1e-6)


def test_a_step_of_int4_is_of_its_group_of_channels() -> None:
    header = header_of("int4")
    cls, patches = tokens_of(5, 1)
    patches[0, 0, :32] = header.patch_mean[:32] + 7 * header.patch_std[:32]  # steps of 1
    patches[0, 0, 32:] = header.patch_mean[32:] + 0.7 * header.patch_std[32:]  # steps of 0.1
    records, _ = records_of(header, cls, patches)
    now = patches.copy()
    now[0, 0, 40] -= 0.2 * header.patch_std[40]
    _, teacher = records_of(header, cls, now)
    assert compare(records, teacher, header, "view", 0.0).steps[0] == pytest.approx(2, rel=1e-2)


def test_a_cls_token_alone_is_enough_to_fail() -> None:
    header = header_of("int8")
    cls, patches = tokens_of(6, 2)
    records, teacher = records_of(header, cls, patches)
    layout = header.layout("view")
    own = records[1, layout.cls_start : layout.scale_start].view("<f2")
    own[5] += 2
    records[1, layout.crc_start :] = np.frombuffer(
        np.uint32(zlib.crc32(records[1, : layout.crc_start])).tobytes(), np.uint8
    )
    found = compare(records, teacher, header, "view", 1 / 127)
    assert found.excess[0] == 0
    assert found.excess[1] > 1
    assert found.steps.max() == 0


def test_what_is_no_number_is_never_equal() -> None:
    header = header_of("fp32")
    cls, patches = tokens_of(7, 1)
    records, teacher = records_of(header, cls, patches)
    layout = header.layout("view")
    records[0, layout.code_start : layout.code_start + 4] = np.frombuffer(
        np.float32("nan").tobytes(), np.uint8
    )
    found = compare(records, teacher, header, "view", 1.0)
    assert found.excess[0] == np.inf
    assert found.cosines[0, 1] == -1


def test_bounds_of_a_coarse_codec_and_of_bf16_are_wider() -> None:
    fine, coarse, half = (
        bounds_of(*words) for words in (("int8", "fp32"), ("int4", "fp32"), ("int8", "bf16"))
    )
    assert (fine.median, fine.noise) == (0.9995, pytest.approx(1 / 127))
    assert coarse.median < fine.median
    assert half.noise > fine.noise
    assert (half.median, half.smallest) == (0.999, 0.984)
    assert fine.smallest < fine.median


@pytest.mark.parametrize(
    ("storage", "precision", "told"),
    [
        ("int8", "fp32", (0.9995, 0.998, 1 / 127)),
        ("int4", "fp32", (0.998, 0.992, 1 / 127)),
        ("fp16", "bf16", (0.999, 0.984, 16 / 127)),
        ("int4", "bf16", (0.996, 0.936, 16 / 127)),
    ],
)
def test_what_is_accepted_is_what_the_manual_says(
    storage: str, precision: str, told: tuple[float, float, float]
) -> None:
    """The table in docs/operations.md, "The target cache"."""
    assert bounds_of(storage, precision) == pytest.approx(told, abs=1e-12)
