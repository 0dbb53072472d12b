"""The benchmarks' own data and parts fit the code that they measure."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from data_tools.backgrounds import load_backgrounds
from dpal.method.dpal import DpalTask
from dpal.target_source import CachedTargets

FOLDER = Path(__file__).parents[3] / "benchmarks"
PARTS = ("augment", "student", "decoder", "losses", "whole")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("bench_train_step")


@pytest.mark.parametrize("name", ["bench_cache", "bench_loader"])
def test_a_benchmark_imports(script: ModuleType, name: str) -> None:
    assert callable(importlib.import_module(name).main)


def test_the_parts_of_a_step_run_and_make_gradients(script: ModuleType, tmp_path: Path) -> None:
    recipe = script.made_recipe(tmp_path, height=128, count=script.BATCH, precision="fp32")
    header = script.made_header(recipe, 48)
    batch = script.made_batch(recipe, header, load_backgrounds(recipe))
    task = DpalTask(recipe, (CachedTargets(header),))
    step = script.Step(recipe, batch, task)
    trained = {"student": task.student, "decoder": task.decoder, "whole": task}
    for part in PARTS:
        task.zero_grad()
        getattr(step, part)()
        if part in trained:
            assert all(p.grad is not None for p in trained[part].parameters()), part
    assert torch.isfinite(task.student.norm.weight).all()
    assert step.flops() > 1e9
