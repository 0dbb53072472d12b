"""Stage `shard`: person images, backgrounds and scenes to WebDataset shards with a manifest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from data_tools.ingest import POLICY_VERSION, check_rejects, list_sources, survey
from data_tools.manifest import Manifest
from data_tools.scenes import is_box_file, num_persons, read_boxes, scene_extras, scenes_url
from data_tools.shard_writer import (
    REJECTS,
    is_complete,
    plan_shards,
    published,
    refuse_other_images,
    write_rejects,
    write_shards,
)
from data_tools.storage import open_store
from data_tools.synthetic import write_dataset
from dpal.base.errors import ConfigError, DataError
from dpal.base.inputs import Data, Storage
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.stage import StageResult

SYNTHETIC = ("synthetic",)
SCENES = "scenes"


def run(recipe: Recipe) -> StageResult:
    """Shard what the recipe names; draw the synthetic persons first if it asks for them.

    Raises:
        DataError: for missing, empty or unusable sources; nothing is published then.
        StorageError: when the shards cannot be written.
    """
    data = recipe.data
    images, backgrounds = tuple(data.images), tuple(data.backgrounds)
    if images == SYNTHETIC:
        folder = RunLayout(recipe.run_dir).synthetic
        write_dataset(folder, data.synthetic, recipe.seed)
        images = (str(folder / "persons"),)
        backgrounds = backgrounds or (str(folder / "backgrounds"),)
    built = [_build(images, data.shards, data, recipe.storage, "persons")]
    details = [_summary(built[0].manifest, "images")]
    if backgrounds:
        url = f"{data.shards.rstrip('/')}/backgrounds"
        built.append(_build(backgrounds, url, data, recipe.storage, "backgrounds"))
        details.append(_summary(built[-1].manifest, "backgrounds"))
    if data.scenes:
        scenes = _build(data.scenes, scenes_url(data.shards), data, recipe.storage, SCENES)
        built.append(scenes)
        details.append(_summary(scenes.manifest, "scenes") + scenes.note)
    return StageResult("shard", all(one.skipped for one in built), "; ".join(details))


def build_shards(
    sources: Sequence[str],
    dest: str,
    data: Data,
    storage: Storage,
    *,
    prefix: str = "persons",
) -> Manifest:
    """Shard the images of folders or URLs `sources` into `dest`; does only what is missing.

    Args:
        data: the policy (`min_side`, `max_pixels`, `max_reject_fraction`) and shard size; its
            own `images` and `shards` are not read.
        prefix: first word of the shards' names.

    Raises:
        DataError: for missing, empty or unusable sources, for too many rejects, and when `dest`
            already holds shards of other images.
    """
    return _build(sources, dest, data, storage, prefix).manifest


class _Built(NamedTuple):
    """Shards that are there now, whether they were before, and what else to say of them."""

    manifest: Manifest
    skipped: bool
    note: str = ""


def _build(sources: Sequence[str], dest: str, data: Data, storage: Storage, prefix: str) -> _Built:
    _refuse_overlap(sources, dest)
    listed = list_sources(sources, storage)
    store = open_store(dest, storage)
    before = published(store)
    policy = f"{POLICY_VERSION} {data.samples_per_shard} {data.min_side} {data.max_pixels}"
    fingerprint = f"{listed.fingerprint} {policy}"
    if before is not None and is_complete(store, before, fingerprint):
        return _Built(before, True)
    images, boxes = listed, None
    if prefix == SCENES:
        boxes = read_boxes(listed)
        pictures = tuple(found for found in listed.files if not is_box_file(found.entry.name))
        images = replace(listed, files=pictures)
    result = survey(images, data, store)
    try:
        check_rejects(result, data, f"{store.url}/{REJECTS}")
    except DataError:
        if before is None:
            write_rejects(store, result.rejects)
        raise
    extras = scene_extras(result.samples, boxes) if boxes is not None else {}
    plans = plan_shards(result.samples, data.samples_per_shard, prefix, extras)
    if before is not None:
        refuse_other_images(store, before, plans)
    manifest = write_shards(listed, result, plans, store, prefix=prefix, fingerprint=fingerprint)
    note = f" with {num_persons(extras)} persons" if boxes is not None else ""
    return _Built(manifest, False, note)


def _refuse_overlap(sources: Sequence[str], dest: str) -> None:
    target = _local(dest)
    for source in sources:
        folder = _local(source)
        if folder is not None and target is not None and target.is_relative_to(folder):
            raise ConfigError(
                f"shards {dest!r} lie inside the source folder {source!r}: choose a place outside"
            )


def _local(url: str) -> Path | None:
    if "://" not in url:
        return Path(url).resolve()
    parts = urlsplit(url)
    return Path(unquote(parts.path)).resolve() if parts.scheme == "file" else None


def _summary(manifest: Manifest, what: str) -> str:
    rejected = sum(count for _reason, count in manifest.rejected)
    tail = f", {rejected} files rejected" if rejected else ""
    return f"{manifest.num_samples} {what} in {len(manifest.shards)} shards{tail}"
