"""What the benchmarks work on, made on the spot: drawn persons, shards, targets, one batch.

Legend: B samples, N patches, D teacher width.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.aligned_samples import AlignedSamples
from data_tools.backgrounds import BackgroundPool
from data_tools.feature_cache import TargetCache
from data_tools.loader import Loader, Slice
from data_tools.manifest import load_manifest
from data_tools.order import Order
from data_tools.raw_samples import RawSamples
from data_tools.skips import SkipList
from data_tools.storage import open_store
from data_tools.synthetic import draw_person
from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe
from dpal.batch import Needs, Records, TrainBatch
from dpal.calibration import fit_header
from dpal.model.timm_import import timm
from dpal.record import Kind, spec_numbers
from dpal.targets.coding import encode_batch
from dpal.targets.header import TargetDefinition, TargetHeader
from dpal.views.plan import ViewPlan
from jobs import build_shards
from jobs.caching.worker import ShardWorker

TEACHER = "vit_tiny_patch16_224"
BATCH = 32


def made_recipe(
    folder: Path,
    *,
    height: int,
    count: int,
    precision: str = "bf16",
    teacher: str = TEACHER,
    teacher_precision: str = "fp32",
    batch: int = BATCH,
) -> Recipe:
    """A recipe over `count` drawn persons of `height` x `height` / 2, sharded in `folder`."""
    images, weights = folder / "persons", folder / "teacher.safetensors"
    images.mkdir()
    for index in range(count):
        person = draw_person(0, index % 16, index, (height, height // 2))
        Image.fromarray(person.image).save(images / f"{index:04d}.jpg", quality=90)
    save_file(timm.create_model(teacher, num_classes=0).state_dict(), weights)
    size = {"height": height, "width": height // 2}
    values: dict[str, Any] = {
        "name": "bench",
        "output": str(folder / "runs"),
        "data": {"images": [str(images)], "samples_per_shard": 64},
        "views": {**size, "count": 2, "composites": 1},
        "teacher": {
            "kind": "timm",
            "name": teacher,
            "weights": str(weights),
            "input": [height, height // 2],
            "precision": teacher_precision,
        },
        "cache": {"calibration_images": 32},
        "student": size,
        "train": {
            "duration": "100 steps",
            "warmup": "10 steps",
            "global_batch": batch,
            "micro_batch": batch,
            "precision": precision,
        },
    }
    recipe = resolve_recipe(values)
    build_shards.run(recipe)
    return recipe


def made_header(recipe: Recipe, width: int) -> TargetHeader:
    """A header for random targets of `width` channels."""
    rows, columns = recipe.views.height // 16, recipe.views.width // 16
    definition = TargetDefinition(
        teacher={"made": width},
        views=ViewPlan(recipe.seed, recipe.views).describe(),
        grid=(rows, columns),
        composite_grid=(rows, rows),
        codec=recipe.cache.codec,
        manifest="",
        backgrounds="",
        calibration_images=BATCH,
    )
    cls, patches = made_tokens(BATCH, rows * columns, width)
    return fit_header(definition, cls, patches, [str(i) for i in range(BATCH)])


def made_tokens(count: int, patches: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Random CLS [B, D] and patch tokens [B, N, D], float32."""
    rng = np.random.default_rng(0)
    shape = (count, patches, width)
    return rng.standard_normal((count, width), np.float32), rng.standard_normal(shape, np.float32)


def made_records(header: TargetHeader, kind: Kind, count: int, plan: ViewPlan) -> np.ndarray:
    """Records of random tokens with true specs: uint8 [B, R]."""
    size, keys = plan.size, [str(i) for i in range(count)]
    specs: list[Any]
    if kind == "view":
        specs = [plan.base(key, 0, size) for key in keys]
    else:
        specs = [plan.composite(key, 0, size, [size]) for key in keys]
    cls, patches = made_tokens(count, header.layout(kind).num_patches, header.width)
    numbers = np.stack([spec_numbers(spec) for spec in specs])
    return encode_batch(cls, patches, numbers, header, kind)


def made_batch(recipe: Recipe, header: TargetHeader, pool: BackgroundPool) -> TrainBatch:
    """The first batch of the recipe, with random targets of one teacher."""
    plan = ViewPlan(recipe.seed, recipe.views)
    batches = made_loader(recipe, pool).batches(0)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert isinstance(batch, TrainBatch)
    kinds: tuple[Kind, Kind] = ("view", "composite")
    records = Records(*(made_records(header, kind, BATCH, plan) for kind in kinds))
    return replace(batch, records=(records,))


def made_loader(
    recipe: Recipe,
    pool: BackgroundPool,
    caches: Sequence[TargetCache] = (),
    *,
    threads: int = 1,
    prefetch: int = 1,
) -> Loader:
    """All views of the recipe's images, joined with the targets of `caches`.

    With `train.render=device` its batches are `RawBatch`es.
    """
    store = open_store(recipe.data.shards, recipe.storage)
    manifest, plan = load_manifest(store), ViewPlan(recipe.seed, recipe.views)
    sizes = [ref.num_samples for ref in manifest.shards]
    order = Order(recipe.seed, sizes, global_batch=BATCH, lanes=BATCH, window=4)
    needs = Needs(crops=True, composite=True)
    at_once = order.shards_at_once(1)
    samples = RawSamples if recipe.train.render == "device" else AlignedSamples
    return Loader(
        store,
        manifest,
        order,
        samples(manifest, plan, pool, needs, caches, shards_at_once=at_once),
        Slice(BATCH, BATCH, 0, 1),
        skips=SkipList(0, recipe.run_dir / "skipped.jsonl"),
        max_pixels=recipe.data.max_pixels,
        threads=threads,
        prefetch=prefetch,
    )


def fill_cache(recipe: Recipe) -> None:
    """Write the recipe's target cache in this process, without Ray."""
    worker = ShardWorker(recipe)
    worker.calibrate()
    for ref in worker.manifest.shards:
        worker.cache_shard(ref)


def one_thread() -> None:
    """Every figure is for one core: PyTorch gets one thread."""
    torch.set_num_threads(1)
