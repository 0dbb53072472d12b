"""Damaged shards, foreign targets and weights, full disks: what `dpal cache` and `train` say."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.ranks import free_port
from data_tools.manifest import ShardRef, manifest_of
from dpal import checkpoint
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.engine import EngineState
from jobs import cache_features, train
from jobs.caching.worker import ShardWorker

from command import call, checked, files, spawn
from tiny import fill_cache, tiny_recipe, write_recipe, write_teacher

Capture = pytest.CaptureFixture[str]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with finished shards and targets, and its file; not to be changed."""
    folder = tmp_path_factory.mktemp("bad-run")
    recipe = tiny_recipe(folder)
    fill_cache(recipe)
    return recipe, write_recipe(recipe, folder / "recipe.yaml")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `dpal cache` do its shards in this process: the same worker, and no half a minute."""

    def in_process(
        recipe: Recipe, refs: Sequence[ShardRef], ready: Callable[[], None]
    ) -> Iterator[tuple[ShardRef, int]]:
        worker = ShardWorker(recipe)
        worker.calibrate()
        ready()
        for ref in refs:
            yield ref, worker.cache_shard(ref)

    monkeypatch.setattr(cache_features, "cache_shards", in_process)


def damaged_shards(recipe: Recipe, folder: Path, index: int) -> tuple[Path, str]:
    """A copy of the shards with one flipped bit in shard `index`; also that shard's name."""
    shutil.copytree(recipe.data.shards, folder)
    shard = sorted(folder.glob("persons-*.tar"))[index]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    return folder, shard.name


def fill_up(disk: Path, leave: int = 0) -> Path:
    """Fill a small file system but for `leave` bytes."""
    ballast = disk / "ballast"
    status = os.statvfs(disk)
    with ballast.open("wb") as file:
        file.write(bytes(max(status.f_bavail * status.f_frsize - leave, 0)))
    return ballast


# ------------------------------------------------------------------------- shards and targets


def test_a_damaged_first_shard_stops_every_stage_before_it_writes(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    recipe, path = world
    shards, name = damaged_shards(recipe, tmp_path / "shards", 0)
    before = files(tmp_path)
    places = [f"output={tmp_path}", f"data.shards={shards}", f"cache.url={tmp_path / 'targets'}"]
    for words in (("cache", path), ("train", path), ("train", path, "train.targets=online")):
        answer = call(capsys, *words, *places)
        assert answer.code == 3
        assert name in answer.sentence
        assert "do not match the manifest's size and checksum" in answer.sentence
    assert files(tmp_path) == before | saved_recipe(tmp_path)


@pytest.mark.slow
def test_a_damaged_last_shard_is_named_by_ray_actors_and_by_training(
    world: tuple[Recipe, Path], tmp_path: Path
) -> None:
    """The damage is met far from the command: in another process, in the loader's thread."""
    recipe, path = world
    shards, name = damaged_shards(recipe, tmp_path / "shards", -1)
    places = [f"output={tmp_path}", f"data.shards={shards}"]
    targets = tmp_path / "targets"
    cached = spawn("cache", path, *places, f"cache.url={targets}")
    assert (cached.code, name in cached.sentence) == (3, True), cached
    (folder,) = targets.iterdir()
    ledger = {row.stem for row in (folder / "ledger").iterdir()}
    assert ledger == {"persons-000000", "persons-000001", "persons-000002"}
    for series in ("view-0", "view-1", "composite-0"):
        assert {tar.stem for tar in (folder / series).iterdir()} == ledger

    trained = spawn("train", path, *places)
    assert (trained.code, name in trained.sentence) == (3, True), trained
    assert checkpoint.latest(RunLayout(tmp_path / "tiny").checkpoints) is None


def test_training_before_caching_names_the_stage_that_is_missing(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    places = [f"output={tmp_path}", f"cache.url={tmp_path / 'targets'}"]
    answer = call(capsys, "train", path, *places)
    assert answer.code == 3
    assert "run `dpal cache`" in answer.sentence
    assert files(tmp_path) == saved_recipe(tmp_path)


def test_targets_of_another_teacher_are_not_trained_on(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    before = files(tmp_path)
    answer = call(capsys, "train", path, f"output={tmp_path}", f"teacher.weights={other}")
    assert answer.code == 3
    assert "differs in teacher.weights (" in answer.sentence
    assert "run `dpal cache`" in answer.sentence
    assert files(tmp_path) == before | saved_recipe(tmp_path)


# -------------------------------------------------------------------------- teacher's weights


def without(state: State) -> None:
    del state["blocks.3.attn.qkv.weight"]


def with_another(state: State) -> None:
    state["blocks.12.norm1.weight"] = torch.ones(192)


def misshapen(state: State) -> None:
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (without, "blocks.3.attn.qkv.weight"),
        (with_another, "blocks.12.norm1.weight"),
        (misshapen, "blocks.0.mlp.fc1.bias is [5], not [768]"),
    ],
)
@pytest.mark.parametrize("verb", ["cache", "train"])
def test_weights_that_fit_only_in_part_are_refused(
    verb: str,
    change: Callable[[State], None],
    key: str,
    world: tuple[Recipe, Path],
    without_ray: None,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    recipe, path = world
    state = load_file(getattr(recipe.teacher, "weights"))  # noqa: B009
    change(state)
    weights = tmp_path / "partial.safetensors"
    save_file(state, weights)
    before = files(tmp_path)
    answer = call(capsys, verb, path, *online(tmp_path), f"teacher.weights={weights}")
    assert answer.code == 2
    assert key in answer.sentence
    assert str(weights) in answer.sentence
    assert files(tmp_path) == before | saved_recipe(tmp_path)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_weights_file_never_runs(
    world: tuple[Recipe, Path], without_ray: None, tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    mark = tmp_path / "it-ran"
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save({"cls_token": Harmful(mark)}, new)
    old.write_bytes(pickle.dumps(Harmful(mark)))
    before = files(tmp_path)
    for weights in (new, old):
        for verb in ("cache", "train"):
            answer = call(capsys, verb, path, *online(tmp_path), f"teacher.weights={weights}")
            assert answer.code == 2
            assert f"{weights}: holds pickled code, which is never run" in answer.sentence
            assert not mark.exists()
    assert files(tmp_path) == before | saved_recipe(tmp_path)
    pickle.loads(old.read_bytes())
    assert mark.exists(), "the file would have harmed"


@pytest.mark.slow  # the hub's library tries six times before it gives up
def test_a_hub_that_cannot_be_reached(world: tuple[Recipe, Path], tmp_path: Path) -> None:
    _recipe, path = world
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "HF_HOME": str(tmp_path / "hub"),
    }
    answer = spawn("cache", path, *online(tmp_path), "teacher.weights=", env=env)
    assert answer.code == 4
    assert "teacher.name='vit_tiny_patch16_224' could not be fetched" in answer.sentence
    assert "Connection refused" in answer.sentence
    assert "give a local file as teacher.weights" in answer.sentence
    assert not (tmp_path / "targets").exists()


# ---------------------------------------------------------------------------------- the run


def test_a_batch_that_the_processes_cannot_share(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    answer = call(capsys, "train", path, f"output={tmp_path}", "train.processes=3")
    assert answer.code == 2
    assert "train.global_batch=8" in answer.sentence
    assert "3 processes" in answer.sentence
    assert files(tmp_path) == saved_recipe(tmp_path)


def test_lanes_that_the_processes_cannot_share(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    words = ["train.processes=3", "train.global_batch=24", "train.micro_batch=4", "train.lanes=16"]
    answer = call(capsys, "train", path, f"output={tmp_path}", *words)
    assert answer.code == 2
    assert "makes 8 lanes" in answer.sentence
    assert "train.lanes=12" in answer.sentence


def test_a_metrics_port_that_is_taken(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    _recipe, path = world
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        answer = call(capsys, "train", path, f"output={tmp_path}", f"train.metrics_port={port}")
    assert answer.code == 2
    assert f"train.metrics_port={port}: Address already in use" in answer.sentence
    assert files(tmp_path) == saved_recipe(tmp_path)


def test_checkpoints_of_another_recipe_are_not_gone_on_from(
    world: tuple[Recipe, Path], tmp_path: Path, capsys: Capture
) -> None:
    recipe, path = world
    state = EngineState(2, {"student.a": torch.ones(1)}, {"a": torch.ones(1)}, {})
    science = train.science_of(recipe, manifest_of(recipe))
    checkpoint.commit(RunLayout(tmp_path / "tiny").checkpoints, state, science, 1)
    before = files(tmp_path)
    fewer = call(capsys, "train", path, f"output={tmp_path}", "data.max_shards=1")
    assert fewer.code == 2
    assert "data.shards" in fewer.sentence, "other images"
    changed = ["train.lr=1e-3", "loss.shape=0.5", "train.log_every=7"]
    answer = call(capsys, "train", path, f"output={tmp_path}", *changed)
    assert answer.code == 2
    assert (
        "loss.shape (1.0 there, 0.5 here), train.lr (0.0005 there, 0.001 here)" in answer.sentence
    )
    assert "log_every" not in answer.sentence, "which may change"
    assert files(tmp_path) == before | saved_recipe(tmp_path)


# -------------------------------------------------------------------------------- full disks


def test_a_disk_that_fills_up_while_sharding(
    world: tuple[Recipe, Path], small_disk: Path, capsys: Capture
) -> None:
    recipe, _path = world
    ballast = fill_up(small_disk, leave=60_000)
    dest = small_disk / "shards"
    words = ["shard", *recipe.data.images, dest, "--set", "samples_per_shard=10"]
    answer = call(capsys, *words)
    assert answer.code == 4
    assert f"cannot write '{dest}/" in answer.sentence
    assert "no space left" in answer.sentence
    left = {Path(name).name for name in files(dest)}
    assert left < {f"persons-{index:06d}.tar" for index in range(4)}, "whole shards only"
    ballast.unlink()
    assert call(capsys, *words).code == 0
    assert (dest / "manifest.json").read_bytes() == Path(
        recipe.data.shards, "manifest.json"
    ).read_bytes()


def test_a_disk_that_fills_up_while_caching(
    world: tuple[Recipe, Path], without_ray: None, small_disk: Path, capsys: Capture
) -> None:
    recipe, path = world
    (whole,) = Path(recipe.cache.url).iterdir()
    fill_up(small_disk, leave=sum(file.stat().st_size for file in whole.rglob("*.*")) // 2)
    before = files(small_disk)
    answer = call(capsys, "cache", path, f"cache.url={small_disk}")
    assert answer.code == 4
    assert "no space left" in answer.sentence
    written = {Path(name).relative_to(small_disk) for name in files(small_disk) - set(before)}
    assert Path(whole.name, "header.json") in written
    for name in written:
        assert (small_disk / name).read_bytes() == (whole.parent / name).read_bytes(), name


def test_a_disk_that_is_full_before_the_first_step(
    world: tuple[Recipe, Path], small_disk: Path, capsys: Capture
) -> None:
    _recipe, path = world
    fill_up(small_disk)
    answer = call(capsys, "train", path, f"output={small_disk}")
    assert answer.code == 4
    assert f"cannot write '{small_disk / 'tiny'}" in answer.sentence
    assert "No space left" in answer.sentence


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_is_too_small_for_a_checkpoint(
    processes: int, world: tuple[Recipe, Path], small_disk: Path
) -> None:
    _recipe, path = world
    ranks = [f"train.processes={processes}", "train.micro_batch=4", "train.zero_stage=1"]
    answer = spawn("train", path, f"output={small_disk}", *ranks, sentences=2 * processes - 1)
    assert answer.code == 4
    checkpoints = RunLayout(small_disk / "tiny").checkpoints
    told = f"checkpoint {checkpoints / 'step-00000002'} could not be written: the disk is full"
    assert answer.printed.count(told) == 1
    assert files(checkpoints) == set()


@pytest.mark.slow
def test_a_killed_rank_is_no_bug_of_the_others(world: tuple[Recipe, Path], tmp_path: Path) -> None:
    _recipe, path = world
    words = [f"output={tmp_path}", "train.processes=2", "train.micro_batch=4"]
    command = [sys.executable, "-m", "jobs", "train", str(path), *words, "train.duration=500 steps"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    events = RunLayout(tmp_path / "tiny").events
    try:
        deadline = time.monotonic() + 240
        while not events.exists() or '"step": 1,' not in events.read_text():
            assert time.monotonic() < deadline, "no first step"
            assert process.poll() is None
            time.sleep(0.1)
        ranks = {
            int(rank.environ()["RANK"]): rank for rank in psutil.Process(process.pid).children()
        }
        ranks[1].kill()
        _out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    answer = checked("train", process.returncode, "", err, sentences=2)
    assert answer.code == 1
    assert "rank 0 lost another rank in the middle of a step" in answer.printed


def online(folder: Path) -> list[str]:
    """Overrides for a run in `folder` that loads its teacher, with `cache` as with `train`."""
    return ["train.targets=online", f"output={folder}", f"cache.url={folder / 'targets'}"]


def saved_recipe(folder: Path) -> set[str]:
    """The one file that a run may leave that never began."""
    path = RunLayout(folder / "tiny").recipe
    return {str(path)} if path.exists() else set()
