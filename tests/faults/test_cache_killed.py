"""`dpal cache` under kill -9, SIGTERM and a rival; `benchmarks/kill_cache.py` does it at length."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.storage import LocalStore
from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from dpal.model.timm_import import timm
from jobs import build_shards, cache_features
from jobs.caching.worker import ShardWorker

NAME = "vit_tiny_patch16_224"
NUM_IMAGES, PER_SHARD = 72, 12  # six shards of about a second each
PATIENCE_S = 240
ROOT = Path(__file__).parents[2]
BEGUN = re.compile(r"^(\d+\.\d+) shard (\S+) begun$", re.MULTILINE)
TICK_S = 0.02  # of the file system's clock
DRIVER = """
import sys
from dpal.base.config import load_recipe
from jobs.cache_features import run
print(run(load_recipe(sys.argv[1])).detail)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), weights)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(NUM_IMAGES):
        small = rng.integers(0, 256, size=(8, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((64, 128))
        picture.save(tmp_path / "images" / f"{index:03d}.jpg", quality=90)
    made = resolve_recipe(
        {
            "name": "killed",
            "output": str(tmp_path / "runs"),
            "data": {"images": [str(tmp_path / "images")], "samples_per_shard": PER_SHARD},
            "views": {"count": 1},
            "teacher": {"kind": "timm", "name": NAME, "weights": str(weights), "batch_size": 4},
            "cache": {"calibration_images": 8},
            "student": {},
            "train": {"duration": "1 steps", "global_batch": 8, "micro_batch": 8},
        }
    )
    build_shards.run(made)
    return made


def undisturbed(recipe: Recipe, url: Path) -> LocalStore:
    """The same cache, made in this process without Ray."""
    before = torch.get_num_threads()
    alone = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"url": str(url)})})
    worker = ShardWorker(alone)
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)
    torch.set_num_threads(before)
    return LocalStore(url)


def start_driver(recipe: Recipe, folder: Path, ray: Path | None = None) -> subprocess.Popen:
    """A job whose log lies in `folder`, and those of its actors in `ray`."""
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    env = os.environ | ({"RAY_TMPDIR": str(ray)} if ray else {})
    with (folder / "driver.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, path], stdout=log, stderr=log, env=env
        )


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, as Ray's sockets want it."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def begun(ray: Path) -> list[tuple[float, str]]:
    """When the actors of a job began which shard, as their logs tell it."""
    logs = [path.read_text(errors="replace") for path in ray.rglob("worker-*.out")]
    return [(float(at), name) for log in logs for at, name in BEGUN.findall(log)]


def wait_for(what: str, probe: Callable[[], object], driver: subprocess.Popen) -> object:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        assert driver.poll() is None, f"the driver ended before {what}"
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {PATIENCE_S} s")


def ray_processes(driver: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def busy_actor(driver: subprocess.Popen) -> psutil.Process | None:
    """The actor while it is inside of `cache_shard`; Ray writes that into the process title."""
    for process in ray_processes(driver):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "TeacherActor.cache_shard" in title:
            return process
    return None


def end(driver: subprocess.Popen, children: list[psutil.Process]) -> None:
    driver.kill()
    driver.wait()
    for process in children:
        if process.is_running():
            process.kill()


@pytest.mark.slow
def test_killed_actor_and_killed_driver_leave_the_cache_of_an_undisturbed_run(
    recipe: Recipe, tmp_path: Path
) -> None:
    expected = undisturbed(recipe, tmp_path / "expected")
    store = LocalStore(Path(recipe.cache.url))

    def rows() -> int:
        return sum("/ledger/" in name for name in store.list())

    driver = start_driver(recipe, tmp_path)
    children: list[psutil.Process] = []
    try:
        wait_for("the first shard", rows, driver)
        actor = wait_for("a busy actor", lambda: busy_actor(driver), driver)
        os.kill(actor.pid, signal.SIGKILL)
        at_kill = rows()
        assert at_kill < NUM_IMAGES // PER_SHARD - 2, "too fast: the kill came after the work"

        # Another actor takes the shard again, and the job goes on without anybody's help.
        wait_for("a shard after the actor's death", lambda: rows() > at_kill, driver)
        second = wait_for("the second actor", lambda: busy_actor(driver), driver)
        assert second.pid != actor.pid

        children = ray_processes(driver)
        # Ray's own two agents notice the death of their parents after about a minute only.
        workers = [process for process in children if "Agent" not in process.name()]
        driver.kill()
        driver.wait()
        assert rows() < NUM_IMAGES // PER_SHARD, "too fast: the kill came after the work"
        _gone, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive, f"left behind by the killed driver: {alive}"
    finally:
        end(driver, children)

    driver = start_driver(recipe, tmp_path)
    try:
        assert driver.wait(PATIENCE_S) == 0, (tmp_path / "driver.log").read_text()
    finally:
        end(driver, [])
    assert store.list() == expected.list()
    assert [name for name in store.list() if store.get(name) != expected.get(name)] == []

    result = cache_features.run(recipe)
    assert result.skipped
    assert "6 shards are there" in result.detail


@pytest.mark.slow
def test_two_jobs_at_once_end_with_the_same_bytes_and_one_ledger(
    recipe: Recipe, tmp_path: Path, short: Path
) -> None:
    expected = undisturbed(recipe, tmp_path / "expected")
    folders = [tmp_path / "one", tmp_path / "two"]
    rays = [short / "1", short / "2"]
    for folder in (*folders, *rays):
        folder.mkdir()
    drivers = [start_driver(recipe, *pair) for pair in zip(folders, rays, strict=True)]
    try:
        for driver, folder in zip(drivers, folders, strict=True):
            assert driver.wait(PATIENCE_S) == 0, (folder / "driver.log").read_text()
    finally:
        for driver in drivers:
            end(driver, [])
    store = LocalStore(Path(recipe.cache.url))
    assert store.list() == expected.list()
    assert [name for name in store.list() if store.get(name) != expected.get(name)] == []
    committed = {path.stem: path.stat().st_ctime for path in store.root.glob("*/ledger/*.json")}
    assert len(committed) == NUM_IMAGES // PER_SHARD
    computed = begun(rays[0]) + begun(rays[1])
    assert {name for _at, name in computed} == {f"{stem}.tar" for stem in committed}
    late = [name for at, name in computed if at > committed[name.removesuffix(".tar")] + TICK_S]
    assert late == []


@pytest.mark.slow
def test_an_actor_that_is_asked_to_go_goes_at_once_and_the_job_ends_well(
    recipe: Recipe, tmp_path: Path
) -> None:
    driver = start_driver(recipe, tmp_path)
    try:
        actor = wait_for("a busy actor", lambda: busy_actor(driver), driver)
        actor.terminate()
        _gone, alive = psutil.wait_procs([actor], timeout=10)
        assert not alive, "SIGTERM did not end the actor"
        assert driver.wait(PATIENCE_S) == 0, (tmp_path / "driver.log").read_text()
    finally:
        end(driver, [])
    assert cache_features.run(recipe).skipped


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_cache_of_an_undisturbed_run() -> None:
    tool = ROOT / "benchmarks" / "kill_cache.py"
    command = [sys.executable, tool, "--kills", "3", "--shards", "10", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE_S)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert " 0 of them after a commit" in done.stdout
