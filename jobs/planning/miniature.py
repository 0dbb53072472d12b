"""A recipe on a few images, in a folder of its own: what `dpal plan --measure` measures with.

The images are the first of the recipe's own shards, or drawn persons where there are none.
"""

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from platform import machine
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.backgrounds import backgrounds_url, has_own_backgrounds
from data_tools.manifest import manifest_of
from data_tools.shard import read_shard
from data_tools.storage import open_store
from data_tools.synthetic import draw_person
from dpal.base.errors import DataError
from dpal.base.inputs import Data, Storage
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from dpal.base.teachers import TaughtTeacher
from dpal.model.taught import arch_of, build_taught
from jobs.build_shards import build_shards
from jobs.planning.rates import Origin, pinned_views

CPU_IMAGES, GPU_IMAGES = 32, 256


class Miniature(NamedTuple):
    """The recipe of a run in miniature, and what it runs on.

    Attributes:
        recipe: one shard of a few images, everything below one folder.
        images: which images these are, in words.
        image_bytes: mean size of an encoded one.
        device: 'cpu' or 'cuda'.
        teacher_threads, student_threads: CPU threads of a teacher, and of training.
    """

    recipe: Recipe
    images: str
    image_bytes: float
    device: str
    teacher_threads: int
    student_threads: int


def make_miniature(recipe: Recipe, folder: Path) -> Miniature:
    """The recipe on a few images: one shard, targets of it, nothing of the recipe's own places."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = GPU_IMAGES if device == "cuda" else CPU_IMAGES
    images = folder / "images"
    told, mean_bytes = _write_images(recipe, images, count)
    micro = min(recipe.train.micro_batch, count)
    composite = "two" if recipe.views.composite == "scenes" else recipe.views.composite
    data = recipe.data.model_copy(  # the words stay, or a taught teacher would be refused
        update={"shards": str(folder / "shards"), "scenes": (), "max_shards": 0}
    )
    mini = recipe.model_copy(
        update={
            "name": "plan",
            "output": str(folder),
            "data": data,
            "storage": Storage(copies=str(folder / "copies")),
            "views": recipe.views.model_copy(update={"composite": composite}),
            "cache": recipe.cache.model_copy(
                update={"url": str(folder / "targets"), "calibration_images": count}
            ),
            "train": recipe.train.model_copy(
                update={"global_batch": micro, "micro_batch": micro, "loader_threads": 0}
            ),
        }
    )
    _random_taught(mini)
    _shard(mini, images, count)
    cores = len(os.sched_getaffinity(0))
    allowed = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // recipe.train.processes)))
    return Miniature(
        mini, told, mean_bytes, device, max(1, int(recipe.cache.cpus_per_actor)), allowed
    )


def _shard(recipe: Recipe, images: Path, count: int) -> None:
    """One shard of the images, which are their own backgrounds if the recipe asks for some."""
    policy = Data(
        images=(str(images),),
        samples_per_shard=count,
        min_side=1,
        max_reject_fraction=1.0,
        max_pixels=recipe.data.max_pixels,
    )
    places = [recipe.data.shards]
    if has_own_backgrounds(recipe):
        places.append(backgrounds_url(recipe))
    for place in places:
        build_shards(policy.images, place, policy, Storage())


def _write_images(recipe: Recipe, folder: Path, count: int) -> tuple[str, float]:
    """Files of the recipe's first images, or of drawn ones: what they are, and their mean size."""
    folder.mkdir()
    sizes = []
    with suppress(DataError):  # no shards yet
        manifest, store = manifest_of(recipe), open_store(recipe.data.shards, recipe.storage)
        shard = read_shard(store, manifest.shards[0], None)
        whole = sum(ref.num_bytes for ref in manifest.shards) / manifest.num_samples
        for row in range(min(count, len(shard))):
            data = shard.image_bytes(row)
            kind = "png" if data.startswith(b"\x89PNG") else "jpg"
            (folder / f"{row:06d}.{kind}").write_bytes(data)
            sizes.append(len(data))
        told = f"the first {len(sizes)} of the recipe's own, {whole:,.0f} bytes each in its shards"
        return told, sum(sizes) / len(sizes)

    for row in range(count):
        path = folder / f"{row:06d}.jpg"
        Image.fromarray(draw_person(recipe.seed, row // 4, row % 4).image).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return f"{count} drawn persons", sum(sizes) / count


def _random_taught(recipe: Recipe) -> None:
    """Weights of a taught teacher that was never taught: it is as fast as one that was."""
    for spec in recipe.teachers:
        if isinstance(spec, TaughtTeacher):
            path = RunLayout(recipe.run_dir).teacher
            path.parent.mkdir(parents=True)
            arch = arch_of(spec, (recipe.views.height, recipe.views.width))
            torch.manual_seed(0)
            save_file(build_taught(arch).state_dict(), path, {"arch": json.dumps(arch)})


def origin_of(recipe: Recipe, mini: Miniature) -> Origin:
    """What the rates that are measured now are of."""
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0))
    if mini.device == "cuda":
        name = torch.cuda.get_device_name()
        host, device = f"{name}, {cores} cores of {cpu}", name
    else:
        host = f"{cores} cores of {cpu}"
        device = (
            f"a process on the CPU (threads in training: {mini.student_threads}, for a teacher: "
            f"{mini.teacher_threads})"
        )
    return Origin(
        date=datetime.now(UTC).date().isoformat(),
        machine=host,
        device=device,
        recipe=recipe.name,
        views=f"{recipe.views.height}x{recipe.views.width}",
        student=recipe.student.name,
        method=recipe.method.kind,
        codec=recipe.cache.codec,
        pinned=pinned_views(recipe.views),
        images=mini.images,
    )


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return machine() or "an unnamed processor"
