"""The covariance beside a header: published once, added to old caches, refused when damaged."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.covariance import COVARIANCE, covariance_bytes
from data_tools.decode import decode_rgb
from data_tools.shard import read_shard
from data_tools.storage import LocalStore
from data_tools.target_audit import audit_targets
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.model.teacher import Teacher
from dpal.views.render import render
from jobs import build_shards, cache_features
from jobs.caching.plan import cache_of, covariance_of, teacher_of
from jobs.caching.worker import ShardWorker

from tiny import fill_cache, tiny_recipe, tiny_values, with_own_targets


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = tiny_recipe(tmp_path_factory.mktemp("calibration"))
    fill_cache(recipe)
    return recipe


@pytest.fixture
def recipe(cached: Recipe, tmp_path: Path) -> Recipe:
    """A recipe whose complete cache is a copy of its own."""
    return with_own_targets(cached, tmp_path)


def phi_s(recipe: Recipe) -> Recipe:
    loss = recipe.loss.model_copy(update={"targets": "phi-s"})
    return recipe.model_copy(update={"loss": loss})


def folder_of(recipe: Recipe) -> Path:
    (folder,) = Path(recipe.cache.url).glob("targets-*")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Name and checksum of every object."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def in_this_process(
    recipe: Recipe, refs: Sequence[object], ready: Callable[[], None] = lambda: None
) -> list[object]:
    """`cache_shards` without Ray."""
    worker = ShardWorker(recipe)
    worker.calibrate()
    ready()
    return [(ref, worker.cache_shard(ref)) for ref in refs]


def test_it_is_the_covariance_of_the_calibration_tokens(recipe: Recipe) -> None:
    worker = ShardWorker(recipe)
    tokens, missing = [], recipe.cache.calibration_images
    for ref in worker.manifest.shards:
        shard = read_shard(worker.store, ref, None)
        for row in range(min(missing, len(shard))):
            image = decode_rgb(shard.image_bytes(row), recipe.data.max_pixels)
            view = worker.plan.base(shard.keys[row], 0, image.shape[:2])
            pixels = torch.from_numpy(render(image, view, worker.plan.size))[None]
            tokens.append(teacher_of(recipe)(pixels).patches[0].numpy())
            missing -= 1
    expected = np.cov(np.concatenate(tokens).astype(np.float64), rowvar=False, bias=True)
    stored = covariance_of(phi_s(recipe), worker.cache)
    np.testing.assert_allclose(stored, expected, atol=1e-4 * np.abs(expected).max())


def test_numpy_reads_the_object_and_it_holds_no_pickle(recipe: Recipe) -> None:
    matrix = np.load(folder_of(recipe) / COVARIANCE, allow_pickle=False)
    assert matrix.dtype == np.float64
    assert matrix.shape == (192, 192)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_a_cache_without_it_serves_raw_targets_and_says_what_phi_s_lacks(recipe: Recipe) -> None:
    (folder_of(recipe) / COVARIANCE).unlink()
    worker = ShardWorker(recipe)
    cache = cache_of(recipe, worker.manifest, worker.pool)
    assert covariance_of(recipe, cache) is None
    with pytest.raises(DataError, match=r"covariance\.npy.*loss\.targets=phi-s.*dpal cache"):
        covariance_of(phi_s(recipe), cache)
    assert audit_targets(LocalStore(folder_of(recipe))) == []


def test_an_old_cache_gets_it_by_one_calibration_and_nothing_else_changes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.cache_features.cache_shards", in_this_process)
    before = contents(folder_of(recipe))
    (folder_of(recipe) / COVARIANCE).unlink()
    assert cache_features.run(recipe).skipped  # raw targets need nothing more
    seen: list[int] = []
    fetch = ShardWorker.cache_shard
    monkeypatch.setattr(ShardWorker, "cache_shard", lambda *args: seen.append(1) or fetch(*args))
    result = cache_features.run(phi_s(recipe))
    assert not result.skipped
    assert "calibration" in result.detail
    assert seen == []
    assert contents(folder_of(recipe)) == before
    assert cache_features.run(phi_s(recipe)).skipped


def test_two_calibrations_at_once_end_with_the_bytes_of_the_first(recipe: Recipe) -> None:
    folder = folder_of(recipe)
    for name in (COVARIANCE, "header.json"):
        (folder / name).unlink()
    one, other = ShardWorker(phi_s(recipe)), ShardWorker(phi_s(recipe))
    publish, raced = LocalStore.put_if_absent, []

    def rival_first(store: LocalStore, name: str, data: bytes) -> bool:
        """The other job publishes its (differing) object just before this one does."""
        if name == COVARIANCE and not raced:
            raced.append(name)
            theirs = np.load(io.BytesIO(data)) * (1 + 1e-12)
            publish(store, name, covariance_bytes(theirs, one.definition.digest))
        return publish(store, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "put_if_absent", rival_first)
        mine = one.calibrate().covariance()
    theirs = other.calibrate().covariance()
    assert raced == [COVARIANCE]
    assert mine.tobytes() == theirs.tobytes()
    assert mine.tobytes() == np.load(folder / COVARIANCE).tobytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "other cache", "not an array", "shape"])
def test_a_damaged_object_is_refused_and_audited(recipe: Recipe, damage: str) -> None:
    path = folder_of(recipe) / COVARIANCE
    data, digest = path.read_bytes(), folder_of(recipe).name.removeprefix("targets-")
    junk = b"junk"
    path.write_bytes(
        {
            "flip": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "cut": data[:-100],
            "other cache": covariance_bytes(np.eye(192), "0" * 16),
            "not an array": junk + hashlib.sha256(digest.encode() + junk).digest(),
            "shape": covariance_bytes(np.eye(191), digest),
        }[damage]
    )
    cache = ShardWorker(recipe).cache
    with pytest.raises(DataError, match=COVARIANCE):
        cache.covariance()
    assert [finding.name for finding in audit_targets(cache.store)] == [COVARIANCE]


def two_teachers(tmp_path: Path) -> Recipe:
    values = tiny_values(tmp_path)
    more = {"more_teachers": [values["teacher"] | {"tap": "block3"}]}
    recipe = resolve_recipe({**values, **more, "loss": {"targets": "standardised"}})
    build_shards.run(recipe)
    return recipe


def test_every_teacher_gets_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.cache_features.cache_shards", in_this_process)
    recipe = two_teachers(tmp_path)
    first, second = (recipe.with_teacher(teacher) for teacher in recipe.teachers)
    alone = cache_features.run(first)
    assert cache_features.run(first).skipped
    both = cache_features.run(recipe)
    assert not both.skipped
    assert "shards are there" in both.detail  # what the first run did is not done again
    assert cache_features.run(recipe).skipped
    worker = ShardWorker(recipe.with_teacher(second.teacher))
    caches = [cache_of(one, worker.manifest, worker.pool) for one in (first, second)]
    assert len({cache.header.digest for cache in caches}) == 2
    assert alone.detail.split(":")[0] == f"targets-{caches[0].header.digest}"
    assert not np.allclose(caches[0].covariance(), caches[1].covariance())


@pytest.mark.parametrize(
    ("section", "setting", "told"),
    [
        ("cache", {"codec": "pca256-int8"}, r"cache\.codec=pca256-int8: .* 192 channels; accepted"),
        ("loss", {"targets": "phi-s"}, r"loss\.targets=phi-s: no Hadamard matrix .* 192 "),
        ("cache", {"codec": "phis-int4"}, r"cache\.codec=phis-int4: no Hadamard matrix .* 192 "),
    ],
)
def test_a_setting_that_does_not_fit_the_teacher_is_refused_before_it_looks(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    setting: dict[str, str],
    told: str,
) -> None:
    url = {"cache": recipe.cache.model_copy(update={"url": str(tmp_path / "none")})}
    own = recipe.model_copy(update=url)
    own = own.model_copy(update={section: getattr(own, section).model_copy(update=setting)})
    monkeypatch.setattr("dpal.phi_s._is_paley", lambda _order: False)  # so that 192 has none
    monkeypatch.setattr(Teacher, "__call__", None)  # it never looks
    with pytest.raises(ConfigError, match=told):
        ShardWorker(own).calibrate()
    assert not (tmp_path / "none").exists()
