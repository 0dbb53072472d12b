"""The benchmark of rendering compares pixels, and renders larger batches of the same samples."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dpal.batch import RawBatch, TrainBatch
from dpal.device_render import DeviceRenderer
from dpal.views.plan import ViewPlan

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_render")


def test_both_ways_are_compared_and_a_larger_batch_is_the_same_samples(
    script: ModuleType, tmp_path: Path
) -> None:
    recipe = script.made_recipe(tmp_path, height=128, count=script.BATCH + 8)
    expected, raw = (next(script.batches_of(recipe, who)) for who in ("loader", "device"))
    assert isinstance(expected, TrainBatch)
    assert isinstance(raw, RawBatch)
    renderer = DeviceRenderer(ViewPlan(recipe.seed, recipe.views))
    rendered = renderer(raw, torch.device("cpu"))
    total = script.BATCH * 3 * (128 * 64 + 2 * 64 * 48 + 128 * 128)
    assert script.differing(expected, rendered) == f"0 of {total:,} values"
    other = torch.as_tensor(rendered.base).clone()
    other[3, 5, 7, 1] ^= 1
    assert script.differing(expected, replace(rendered, base=other)) == f"1 of {total:,} values"

    larger = renderer(script.repeated(raw, 3), torch.device("cpu"))
    for name in ("base", "crops", "composite"):
        copies = getattr(larger, name).chunk(3)
        assert all(torch.equal(copy, getattr(rendered, name)) for copy in copies), name
    assert script.size_of(script.repeated(raw, 3)) == 3 * script.size_of(raw)
    assert script.size_of(expected) == total / 1e6
