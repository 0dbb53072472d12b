"""`dpal train` on object storage that will not serve: the exit code, and how often it asks."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from data_tools.manifest import load_manifest
from data_tools.storage import LocalStore, open_store
from dpal.base.recipe import Recipe

from command import call, spawn
from fault_proxy import Fault, FaultProxy, faulty_server, no_faults, proxy
from seaweed import KEY, SECRET, S3Server, s3_server
from tiny import fill_cache, tiny_recipe, write_recipe

__all__ = ["faulty_server", "proxy", "s3_server"]

Capture = pytest.CaptureFixture[str]
WRONG = "hunter2-wrong-value"


class World(NamedTuple):
    """A recipe with finished targets, its file, and the URL of a copy of its shards."""

    recipe: Recipe
    path: Path
    url: str


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server
) -> tuple[Recipe, Path, str]:
    """A recipe with finished targets, its file, and the URL of a copy of its shards."""
    folder = tmp_path_factory.mktemp("storage-train")
    recipe = tiny_recipe(folder)
    fill_cache(recipe)
    path = write_recipe(recipe, folder / "recipe.yaml")
    return World(recipe, path, upload(recipe, s3_server))


def upload(recipe: Recipe, server: S3Server, *, without: str = "") -> str:
    """A copy of the recipe's shards in the store, but for one of them."""
    url, local = server.url(), LocalStore(Path(recipe.data.shards))
    store = open_store(url, server.storage())
    for name in ["manifest.json", *(ref.name for ref in load_manifest(local).shards)]:
        if name != without:
            store.put(name, local.get(name))
    return url


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return monkeypatch


def words(path: Path, url: str, server: S3Server, folder: Path) -> list[str | Path]:
    """A command that trains for two steps on the shards at `url`."""
    storage = [f"storage.endpoint_url={server.endpoint}", "storage.retries=2"]
    waits = ["storage.timeout_s=2", "train.duration=2 steps", "train.warmup=1 steps"]
    return ["train", path, f"data.shards={url}", f"output={folder}", *storage, *waits]


def asked(proxy: FaultProxy) -> Counter[str]:
    """How often each object was asked for, by its name."""
    return Counter(request.path.rpartition("/")[2] for request in proxy.requests)


@pytest.mark.slow
def test_training_outlasts_faults_and_runs_share_their_copies(
    world: World,
    credentials: pytest.MonkeyPatch,
    faulty_server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    kinds = ("503", "truncate", "flip", "reset before")
    seen: Counter[str] = Counter()

    def schedule(_number: int, _method: str, path: str) -> Fault:
        seen[path] += 1
        is_first = path.endswith(".tar") and seen[path] == 1
        return Fault(kinds[int(path[-5]) % 4]) if is_first else Fault()

    proxy.set(schedule)
    copies = f"storage.copies={tmp_path / 'copies'}"
    first = spawn(*words(world.path, world.url, faulty_server, tmp_path / "a"), copies)
    assert first.code == 0, first.printed
    refs = load_manifest(LocalStore(Path(world.recipe.data.shards))).shards
    kept = {copy.stem for copy in (tmp_path / "copies").glob("*.tar")}
    assert kept == {ref.sha256 for ref in refs}
    proxy.set(no_faults)
    backgrounds_alone = ["data.backgrounds=[]", copies]
    second = spawn(*words(world.path, world.url, faulty_server, tmp_path / "b"), *backgrounds_alone)
    assert second.code == 0, second.printed
    assert max(asked(proxy)[ref.name] for ref in refs) <= 1, "by the backgrounds alone"


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_end_training_after_one_request(
    wrong: str,
    world: World,
    credentials: pytest.MonkeyPatch,
    faulty_server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    credentials.setenv(wrong, WRONG)
    answer = call(capsys, *words(world.path, world.url, faulty_server, tmp_path))
    assert answer.code == 4
    assert "the store refuses these credentials" in answer.sentence
    assert WRONG not in answer.printed
    assert len(proxy.requests) == 1


def test_a_missing_bucket_ends_training_at_once(
    world: World,
    credentials: pytest.MonkeyPatch,
    faulty_server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    answer = call(capsys, *words(world.path, "s3://no-such-bucket/shards", faulty_server, tmp_path))
    assert answer.code == 4
    assert "no-such-bucket" in answer.sentence
    assert "bucket does not exist" in answer.sentence
    assert len(proxy.requests) <= 2, proxy.requests


@pytest.mark.slow
def test_a_shard_missing_in_the_middle_of_training_ends_it_by_name(
    world: World,
    credentials: pytest.MonkeyPatch,
    s3_server: S3Server,
    faulty_server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    gone = load_manifest(LocalStore(Path(world.recipe.data.shards))).shards[-1].name
    url = upload(world.recipe, s3_server, without=gone)
    answer = spawn(*words(world.path, url, faulty_server, tmp_path))
    assert answer.code == 3
    assert f"object '{url}/{gone}' does not exist" in answer.sentence
    assert asked(proxy)[gone] == 1


def test_a_store_that_stays_down_ends_training_after_bounded_retries(
    world: World,
    credentials: pytest.MonkeyPatch,
    faulty_server: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    proxy.set(lambda _number, _method, path: Fault("503") if path.endswith(".tar") else Fault())
    answer = call(capsys, *words(world.path, world.url, faulty_server, tmp_path))
    assert answer.code == 4
    assert "after 3 attempts: the store answered 503 SlowDown" in answer.sentence
    assert max(asked(proxy)[name] for name in asked(proxy) if name.endswith(".tar")) == 3
