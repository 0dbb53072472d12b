"""A tiny real world for tests: a few drawn persons, a small random ViT as teacher, a short run."""

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.synthetic import draw_person
from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from dpal.model.timm_import import timm
from jobs import build_shards
from jobs.caching.worker import ShardWorker

TEACHER = "vit_tiny_patch16_224"
NUM_IMAGES = 40


def write_persons(folder: Path, count: int = NUM_IMAGES) -> Path:
    """Draw `count` persons of several identities as JPEG files."""
    folder.mkdir(parents=True)
    for index in range(count):
        person = draw_person(0, index % 8, index)
        Image.fromarray(person.image).save(folder / f"{index:03d}.jpg", quality=90)
    return folder


def write_teacher(path: Path, seed: int = 0) -> Path:
    """Weights of a random ViT-Ti."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), path)
    return path


def tiny_values(folder: Path, **train: Any) -> dict[str, Any]:
    """A recipe as a mapping: 40 persons of 128 x 64, 6 steps of 8; `train` overrides that section.

    Images and teacher weights are made in `folder` when they are not there.
    """
    images, weights = folder / "persons", folder / "teacher.safetensors"
    if not images.exists():
        write_persons(images)
    if not weights.exists():
        write_teacher(weights)
    return {
        "name": "tiny",
        "output": str(folder / "runs"),
        "data": {"images": [str(images)], "samples_per_shard": 10},
        "views": {"height": 128, "width": 64, "count": 2, "composites": 1},
        "teacher": {
            "kind": "timm",
            "name": TEACHER,
            "weights": str(weights),
            "input": [128, 64],
            "batch_size": 5,
        },
        "cache": {"calibration_images": 20},
        "student": {"height": 128, "width": 64},
        "train": {
            "duration": "6 steps",
            "warmup": "2 steps",
            "global_batch": 8,
            "micro_batch": 8,
            "lr": 5e-4,
            "precision": "fp32",
            "checkpoint_every": 2,
            "log_every": 1,
            **train,
        },
    }


def tiny_recipe(folder: Path, **train: Any) -> Recipe:
    """`tiny_values` as a recipe, with its images sharded."""
    recipe = resolve_recipe(tiny_values(folder, **train))
    build_shards.run(recipe)
    return recipe


def fill_cache(recipe: Recipe) -> None:
    """Write the recipe's target cache in this process, without Ray."""
    threads = torch.get_num_threads()
    worker = ShardWorker(recipe)
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)
    torch.set_num_threads(threads)


def with_own_targets(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a copy of its complete cache, below `folder`."""
    shutil.copytree(recipe.cache.url, folder / "targets")
    cache = recipe.cache.model_copy(update={"url": str(folder / "targets")})
    return recipe.model_copy(update={"cache": cache})


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file, for a command in another process."""
    path.write_text(recipe.to_yaml())
    return path
