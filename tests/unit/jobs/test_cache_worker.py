"""Caching one shard, without Ray: the targets are the teacher's own, whatever the batch size."""

import io
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.decode import decode_rgb
from data_tools.feature_cache import TargetCache, series_of
from data_tools.shard import Shard, read_shard
from data_tools.storage import LocalStore
from dpal.base.config import resolve_recipe
from dpal.base.errors import ConfigError, DataError
from dpal.base.recipe import Recipe
from dpal.model.timm_import import timm
from dpal.model.tokens import Tokens
from dpal.record import spec_of
from dpal.targets.coding import decode_batch
from dpal.views.render import render, render_composite
from jobs import build_shards, cache_features
from jobs.caching import worker as cache_worker
from jobs.caching.forward import HalvingForward
from jobs.caching.plan import cache_of, definition_of, teacher_of
from jobs.caching.session import absolute
from jobs.caching.worker import ShardWorker

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(14):
        small = rng.integers(0, 256, size=(8, 4, 3), dtype=np.uint8)
        size = (60 + 3 * index, 120 + index)
        Image.fromarray(small).resize(size).save(folder / f"{index:03d}.jpg", quality=90)
    return folder


def recipe_of(tmp_path: Path, images: Path, weights: Path, **sections) -> Recipe:
    recipe = resolve_recipe(
        {
            "name": "worker",
            "output": str(tmp_path),
            "data": {"images": [str(images)], "samples_per_shard": 10},
            "views": {"height": 128, "width": 64, "count": 2},
            "teacher": {"kind": "timm", "name": NAME, "weights": str(weights), "input": [128, 64]},
            "cache": {"calibration_images": 12},
            "student": {"height": 128, "width": 64},
            "train": {"duration": "1 steps", "global_batch": 8, "micro_batch": 8},
        }
        | sections
    )
    build_shards.run(recipe)
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, images: Path, weights: Path) -> Recipe:
    return recipe_of(tmp_path, images, weights)


def cached(recipe: Recipe) -> ShardWorker:
    worker = ShardWorker(recipe)
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)
    return worker


def with_teacher(recipe: Recipe, url: Path, **changes) -> Recipe:
    teacher = recipe.teacher.model_copy(update=changes)
    cache = recipe.cache.model_copy(update={"url": str(url)})
    return recipe.model_copy(update={"teacher": teacher, "cache": cache})


def test_targets_are_the_teachers_tokens_of_the_stored_view(recipe: Recipe) -> None:
    worker = cached(recipe)
    cache = cache_of(recipe, worker.manifest, worker.pool)
    teacher = teacher_of(recipe)
    for ref in worker.manifest.shards:
        shard = read_shard(worker.store, ref, None)
        for series in series_of(recipe.views):
            targets, layout = cache.shard(series, ref), cache.layout(series)
            targets.require_keys(shard.keys)
            records = targets.records(range(len(shard)))
            stored = decode_batch(records, cache.header, layout.kind)
            views = []
            for row in range(len(shard)):
                image = np.asarray(Image.open(io.BytesIO(shard.image_bytes(row))))
                spec = spec_of(records[row, : layout.cls_start].copy().view("<u2"))
                if layout.kind == "view":
                    views.append(render(image, spec, worker.plan.size))
                else:
                    behind = worker.pool.images[spec.background]
                    views.append(render_composite(image, behind, spec, worker.plan))
            online = teacher(torch.from_numpy(np.stack(views)))
            error = (stored.patches - online.patches) / torch.from_numpy(cache.header.patch_std)
            assert error.square().mean().sqrt() < 0.02
            cosine = torch.cosine_similarity(stored.patches, online.patches, dim=-1)
            assert cosine.median() > 0.9998
            assert (stored.cls - online.cls).abs().max() < 0.01


def test_batch_size_does_not_change_a_byte(recipe: Recipe, tmp_path: Path) -> None:
    stores = []
    for size in (3, 32):
        url = tmp_path / f"batch-{size}"
        cached(with_teacher(recipe, url, batch_size=size))
        stores.append(LocalStore(url))
    first, second = stores
    assert first.list() == second.list()
    assert [name for name in first.list() if first.get(name) != second.get(name)] == []


def test_what_does_not_decide_a_byte_does_not_change_the_folder(recipe: Recipe) -> None:
    worker = ShardWorker(recipe)
    other = with_teacher(recipe, Path(recipe.cache.url), batch_size=3)
    cache = other.cache.model_copy(update={"actors": 7, "shard_timeout_s": 9.0})
    other = other.model_copy(update={"cache": cache})
    assert definition_of(other, worker.manifest, worker.pool).digest == worker.definition.digest


def test_two_shards_at_once_are_the_bytes_of_one_after_the_other(
    recipe: Recipe, tmp_path: Path
) -> None:
    cached(with_teacher(recipe, tmp_path / "alone"))
    worker = ShardWorker(with_teacher(recipe, tmp_path / "together"))
    worker.calibrate()
    with ThreadPoolExecutor(2) as threads:
        views = list(threads.map(worker.cache_shard, worker.manifest.shards))
    each = len(series_of(recipe.views))
    assert views == [each * ref.num_samples for ref in worker.manifest.shards]
    alone, together = LocalStore(tmp_path / "alone"), LocalStore(tmp_path / "together")
    assert together.list() == alone.list()
    assert [name for name in alone.list() if alone.get(name) != together.get(name)] == []


def test_while_one_shard_has_the_teacher_another_is_rendered_or_written(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ShardWorker(recipe)
    worker.calibrate()
    teacher, render_one = worker.teacher, worker.renderer._render
    publish, patience = TargetCache.publish_shard, 60
    rendered, calls = set(), []
    both_rendered, writing, taught = Event(), Event(), Event()

    def forward(pixels: torch.Tensor) -> Tokens:
        calls.append(len(pixels))
        if len(calls) == 1:
            assert both_rendered.wait(patience), "nothing is rendered ahead"
        if len(calls) > len(series_of(recipe.views)):  # of the second shard
            assert writing.wait(patience)
            taught.set()
        return teacher(pixels)

    def seen(shard: Shard, *words: object) -> object:
        rendered.add(shard.ref.name)
        if len(rendered) == 2:
            both_rendered.set()
        return render_one(shard, *words)

    def slow(*words: object) -> object:
        writing.set()
        assert taught.wait(patience), "the teacher waits until a shard is written"
        return publish(*words)

    monkeypatch.setattr(worker, "forward", forward)
    monkeypatch.setattr(worker.renderer, "_render", seen)
    monkeypatch.setattr(TargetCache, "publish_shard", slow)
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(worker.cache_shard, worker.manifest.shards))


def test_memory_that_holds_three_images_changes_no_byte(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(with_teacher(recipe, tmp_path / "roomy"))
    worker = ShardWorker(with_teacher(recipe, tmp_path / "short"))
    teacher, seen = worker.teacher, []

    def short(pixels: torch.Tensor) -> Tokens:
        seen.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return teacher(pixels)

    monkeypatch.setattr(worker, "forward", HalvingForward(short, recipe.teacher.batch_size))
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)
    assert max(seen) > 3
    assert seen[-1] <= 3
    roomy, found = LocalStore(tmp_path / "roomy"), LocalStore(tmp_path / "short")
    assert found.list() == roomy.list()
    assert [name for name in roomy.list() if roomy.get(name) != found.get(name)] == []


def test_a_shard_that_a_rival_commits_while_it_is_rendered_is_not_computed(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, rival = ShardWorker(recipe), ShardWorker(recipe)
    ref = worker.calibrate() and worker.manifest.shards[0]
    read = cache_worker.read_shard

    def read_while_the_rival_works(*arguments: object) -> object:
        monkeypatch.setattr(cache_worker, "read_shard", read)
        assert rival.cache_shard(ref) > 0
        return read(*arguments)

    monkeypatch.setattr(cache_worker, "read_shard", read_while_the_rival_works)
    monkeypatch.setattr(worker, "forward", None)  # calling it would fail
    assert worker.cache_shard(ref) == 0
    monkeypatch.setattr(cache_worker, "read_shard", None)  # nor is a committed one fetched
    assert worker.cache_shard(ref) == 0


def test_records_that_cannot_be_made_end_the_shard(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ShardWorker(recipe)
    worker.calibrate()
    teacher, ref = worker.teacher, worker.manifest.shards[0]

    def infinite(pixels: torch.Tensor) -> Tokens:
        tokens = teacher(pixels)
        return Tokens(tokens.cls, tokens.patches * float("inf"))

    monkeypatch.setattr(worker, "forward", infinite)
    with pytest.raises(DataError, match=f"shard '{ref.name}'"):
        worker.cache_shard(ref)
    assert worker.cache.finished() == set()


def test_calibrating_twice_keeps_the_published_header(recipe: Recipe) -> None:
    first, second = cache_features.calibrate(recipe), cache_features.calibrate(recipe)
    assert first.header.to_json() == second.header.to_json()


def test_calibrating_before_training_leaves_its_threads_as_they_are(recipe: Recipe) -> None:
    cache = recipe.cache.model_copy(update={"calibration_images": 9})
    fresh, before = recipe.model_copy(update={"cache": cache}), torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        cache_features.calibrate(fresh)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_an_image_that_does_not_decode_names_shard_and_sample(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = ShardWorker(recipe)
    worker.calibrate()
    ref = worker.manifest.shards[0]
    shard = read_shard(worker.store, ref, None)
    fifth = shard.image_bytes(4)

    def refuse_the_fifth(data: bytes, max_pixels: int) -> np.ndarray:
        return decode_rgb(data[:200] if data == fifth else data, max_pixels)

    monkeypatch.setattr("jobs.caching.batches.decode_rgb", refuse_the_fifth)
    with pytest.raises(DataError, match=f"shard '{ref.name}', sample '{shard.keys[4]}'"):
        worker.cache_shard(ref)
    assert worker.cache.finished() == set()


def test_the_job_refuses_shards_that_were_changed(recipe: Recipe) -> None:
    worker = ShardWorker(recipe)
    worker.calibrate()
    ref = worker.manifest.shards[1]
    path = Path(recipe.data.shards) / ref.name
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=ref.name):
        worker.cache_shard(ref)


def test_a_gpu_that_is_not_there_is_a_sentence(recipe: Recipe) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="gpus_per_actor"):
        ShardWorker(recipe, device="cuda")


def test_a_finished_cache_is_skipped_without_ray(recipe: Recipe, monkeypatch) -> None:
    cached(recipe)
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it would fail
    result = cache_features.run(recipe)
    assert result.skipped


def test_actors_get_paths_that_do_not_depend_on_their_working_folder(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = recipe.model_copy(update={"output": "runs"})
    assert absolute(relative).output == str(tmp_path / "runs")
    far = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"shards": "s3://bucket/shards"})}
    )
    assert absolute(far).data.shards == "s3://bucket/shards"


def test_target_tars_hold_the_image_shards_keys_in_order(recipe: Recipe) -> None:
    worker = cached(recipe)
    ref = worker.manifest.shards[0]
    with tarfile.open(worker.cache.store.path(f"view-1/{ref.name}")) as tar:
        names = [member.name.removesuffix(".targets") for member in tar]
    assert tuple(names) == read_shard(worker.store, ref, None).keys
