"""A committed checkpoint loads; anything else is never loaded."""

import shutil
from pathlib import Path

import pytest
import torch

from dpal import checkpoint
from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.engine import EngineState

SCIENCE = {"seed": 0, "train.lr": 0.001}


def state(step: int) -> EngineState:
    names = ("student.a", "student.b.c", "decoder.w")
    values = {name: torch.full((3, 2), float(step + i)) for i, name in enumerate(names)}
    return EngineState(step, values, {n: v + 10 for n, v in values.items()}, dict(values))


def test_round_trip_keeps_every_tensor_and_the_step(tmp_path: Path) -> None:
    checkpoint.commit(tmp_path, state(7), SCIENCE, keep=2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    loaded = checkpoint.load(found)
    assert loaded.step == 7
    for part in ("parameters", "exp_avg", "exp_avg_sq"):
        expected, actual = getattr(state(7), part), getattr(loaded, part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.commit(tmp_path, state(step), SCIENCE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize("lost", ["COMMITTED", "state.json"])
def test_an_uncommitted_folder_is_passed_over_and_later_replaced(tmp_path: Path, lost: str) -> None:
    checkpoint.commit(tmp_path, state(1), SCIENCE, keep=5)
    newer = checkpoint.commit(tmp_path, state(2), SCIENCE, keep=5)
    (newer.path / lost).unlink()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert checkpoint.commit(tmp_path, state(2), SCIENCE, keep=5).step == 2
    assert checkpoint.load(checkpoint.latest(tmp_path)).step == 2


def test_a_changed_state_file_is_not_committed(tmp_path: Path) -> None:
    written = checkpoint.commit(tmp_path, state(4), SCIENCE, keep=5)
    text = (written.path / "state.json").read_text()
    (written.path / "state.json").write_text(text.replace('"step": 4', '"step": 9'))
    assert checkpoint.latest(tmp_path) is None


def test_a_damaged_tensor_file_is_refused_by_name(tmp_path: Path) -> None:
    written = checkpoint.commit(tmp_path, state(4), SCIENCE, keep=5)
    file = written.path / "exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"exp_avg\.safetensors"):
        checkpoint.load(checkpoint.latest(tmp_path))


def test_another_recipe_is_refused_with_the_key_that_differs(tmp_path: Path) -> None:
    written = checkpoint.commit(tmp_path, state(4), SCIENCE, keep=5)
    checkpoint.check_same_science(written, dict(SCIENCE))
    with pytest.raises(ConfigError, match=r"train\.lr \(0\.001 there, 0\.1 here\)"):
        checkpoint.check_same_science(written, {**SCIENCE, "train.lr": 0.1})


def test_a_full_disk_leaves_the_older_checkpoint_and_no_partial_one(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpoint.commit(folder, state(1), SCIENCE, keep=5)
    big = {"student.w": torch.zeros(1 << 20), "decoder.w": torch.zeros(1 << 20)}
    with pytest.raises(StorageError, match="full"):
        checkpoint.commit(folder, EngineState(2, big, big, big), SCIENCE, keep=5)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert checkpoint.load(checkpoint.latest(folder)).step == 1
    shutil.rmtree(folder)
