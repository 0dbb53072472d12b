"""The address of a cache: every input moves it, nothing else does, and recipes share by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.manifest import Manifest, manifest_of
from dpal.base.methods import Mse
from dpal.base.recipe import Recipe
from dpal.model import teacher as teachers
from dpal.targets.header import TARGET_VERSION, TargetDefinition
from dpal.views import plan
from jobs import cache_features
from jobs.caching.plan import definition_of
from jobs.caching.worker import ShardWorker

from tiny import fill_cache, tiny_recipe, write_persons


class World:
    """A recipe with its data, and the digest of its cache."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.manifest: Manifest = manifest_of(recipe)
        self.pool: BackgroundPool = load_backgrounds(recipe)

    def digest(self, recipe: Recipe | None = None, **data: Any) -> str:
        manifest, pool = data.get("manifest", self.manifest), data.get("pool", self.pool)
        return definition_of(recipe or self.recipe, manifest, pool).digest

    def changed(self, section: str, key: str, value: Any) -> Recipe:
        inner = getattr(self.recipe, section).model_copy(update={key: value})
        return self.recipe.model_copy(update={section: inner})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("address")
    write_persons(folder / "persons", 12)
    return World(tiny_recipe(folder))


MOVES = [
    ("teacher", "tap", "block3"),
    ("teacher", "name", "vit_tiny_patch16_384"),
    ("teacher", "input", (256, 128)),
    ("teacher", "mean", (0.5, 0.5, 0.5)),
    ("teacher", "std", (0.5, 0.5, 0.5)),
    ("teacher", "precision", "bf16"),
    ("views", "count", 4),
    ("views", "composites", 2),
    ("views", "composite", "two"),
    ("views", "scale", (0.5, 1.0)),
    ("views", "aspect", (0.9, 1.1)),
    ("views", "crop_scale", (0.3, 0.4)),
    ("views", "photometric", "pinned"),
    ("cache", "codec", "fp16"),
    ("cache", "codec", "pca64-int8"),
    ("cache", "calibration_images", 21),
]
STAYS = [
    ("teacher", "batch_size", 3),
    ("views", "crops", 1),
    ("views", "photometric", "off"),
    ("cache", "actors", 2),
    ("cache", "cpus_per_actor", 2.0),
    ("cache", "url", "elsewhere"),
    ("cache", "ray_address", "auto"),
    ("student", "name", "vit_small"),
    ("loss", "teacher_drop", 0.3),
    ("train", "global_batch", 16),
    ("train", "seed", 5),
    ("train", "lr", 1e-4),
    ("data", "max_skip_fraction", 0.1),
    ("storage", "retries", 1),
]


@pytest.mark.parametrize(("section", "key", "value"), MOVES)
def test_another_value_is_another_folder(
    world: World, section: str, key: str, value: object
) -> None:
    assert world.digest(world.changed(section, key, value)) != world.digest()


@pytest.mark.parametrize(("section", "key", "value"), STAYS)
def test_what_decides_no_target_leaves_the_folder(
    world: World, section: str, key: str, value: object
) -> None:
    other = world.changed(section, key, value)
    assert other != world.recipe
    assert world.digest(other) == world.digest()


def test_names_and_folders_of_runs_leave_the_folder_and_the_seed_does_not(world: World) -> None:
    named = world.recipe.model_copy(update={"name": "other", "output": "elsewhere"})
    assert world.digest(named) == world.digest()
    assert world.digest(world.recipe.model_copy(update={"seed": 1})) != world.digest()


def test_one_byte_of_the_weights_is_enough(world: World, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    data = bytearray(Path(world.recipe.teacher.weights).read_bytes())
    path.write_bytes(data)
    same = world.changed("teacher", "weights", str(path))
    assert world.digest(same) == world.digest()
    data[-1] ^= 1
    path.write_bytes(data)
    assert world.digest(same) != world.digest()
    save_file(load_file(world.recipe.teacher.weights), path, metadata={"note": "moved"})
    assert world.digest(same) != world.digest(), "the address is of bytes, not of numbers"


@pytest.mark.parametrize(
    "moved",
    [
        lambda w: {"manifest": Manifest(w.manifest.shards[1:])},
        lambda w: {"pool": BackgroundPool(w.pool.images, "0" * 16)},
    ],
    ids=["shards", "backgrounds"],
)
def test_other_images_are_another_folder(world: World, moved: Callable[[World], dict]) -> None:
    assert world.digest(**moved(world)) != world.digest()


@pytest.mark.parametrize(
    ("module", "name"),
    [(teachers, "TEACHER_VERSION"), (plan, "PLAN_VERSION")],
    ids=["teacher", "plan"],
)
def test_a_version_of_the_code_is_another_folder(
    world: World, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    before = world.digest()
    monkeypatch.setattr(module, name, 99)
    assert world.digest() != before


def test_the_version_of_the_definition_and_of_the_library_are_in_the_address(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = definition_of(world.recipe, world.manifest, world.pool)
    assert plain.version == TARGET_VERSION
    again = TargetDefinition(**{**vars(plain), "version": plain.version + 1})
    assert again.digest != plain.digest
    monkeypatch.setattr(teachers, "version", lambda name: "99.1.2")
    other = definition_of(world.recipe, world.manifest, world.pool)
    assert "99.1" in other.teacher["library"]
    assert other.digest != plain.digest


def test_recipes_that_differ_in_what_learns_share_one_cache(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(world.recipe)
    folder = Path(world.recipe.cache.url)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert len(before) > 6
    other = world.changed("train", "lr", 1e-4).model_copy(update={"name": "other"})
    student = other.student.model_copy(update={"name": "vit_small"})
    other = other.model_copy(update={"student": student, "method": Mse()})
    monkeypatch.setattr(ShardWorker, "teacher", None)  # whoever loads it fails
    done = cache_features.run(other)
    assert done.skipped
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before
