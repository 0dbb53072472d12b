"""Stage `shard`: person images, backgrounds and scenes to WebDataset shards with a manifest."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.cutting import sample_bytes
from data_tools.ingest import check_rejects, list_items, survey
from data_tools.ledger import TRAIN, VALIDATION, Ledger
from data_tools.ledger_rows import Sample
from data_tools.manifest import Manifest
from data_tools.policy import POLICY_VERSION
from data_tools.scene_source import SceneFolder
from data_tools.scenes import scenes_url
from data_tools.shard_writer import (
    REJECTS,
    ShardPlan,
    ShardSet,
    is_complete,
    num_writers,
    plan_shards,
    published,
    refuse_other_images,
    write_rejects,
    write_shards,
)
from data_tools.source import Source
from data_tools.sources import open_source
from data_tools.sources.folder import FolderSource
from data_tools.storage import SourceStore, local_path, open_store
from data_tools.synthetic import write_dataset
from dpal.base.errors import ConfigError, DataError
from dpal.base.inputs import Data, Storage
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.stage import StageResult

SYNTHETIC = ("synthetic",)
PERSONS, BACKGROUNDS, SCENES = "persons", "backgrounds", "scenes"
VALIDATION_FOLDER = "validation"

# Keys that change what is kept or how its bytes are; named in the fingerprint when set.
POLICY_KEYS = {
    *("names", "pictures", "persons", "margin"),
    *("encode", "jpeg_quality", "max_side", "near_duplicates", "validation_fraction"),
}


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
    built = [_build(images, data.shards, data, recipe.storage, PERSONS)]
    details = [_summary(built[0], "images")]
    if backgrounds:
        url = f"{data.shards.rstrip('/')}/backgrounds"
        built.append(_build(backgrounds, url, data, recipe.storage, BACKGROUNDS))
        details.append(_summary(built[-1], "backgrounds"))
    if data.scenes:
        scenes = _build(data.scenes, scenes_url(data.shards), data, recipe.storage, SCENES)
        built.append(scenes)
        details.append(_summary(scenes, "scenes"))
    return StageResult("shard", all(one.skipped for one in built), "; ".join(details))


def build_shards(
    sources: Sequence[str],
    dest: str,
    data: Data,
    storage: Storage,
    *,
    prefix: str = PERSONS,
) -> Manifest:
    """Shard the images of `sources` into `dest`; does only what is missing.

    Args:
        sources: folders, lists, annotation files or archives, as `open_source` takes them.
        data: the policy and shard size; its own `images` and `shards` are not read.
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


class _Target(NamedTuple):
    """One data set that a build publishes."""

    store: SourceStore
    part: int
    before: Manifest | None


def _build(sources: Sequence[str], dest: str, data: Data, storage: Storage, prefix: str) -> _Built:
    _refuse_overlap(sources, dest)
    data = _policy_for(prefix, data)
    opened = tuple(_open(url, data, storage, prefix) for url in sources)
    targets = _targets(dest, data, storage)
    with Ledger([source.url for source in opened]) as ledger:
        fingerprint = f"{list_items(opened, ledger)} {_policy(data)}"
        main = targets[-1]
        if all(one.before and is_complete(one.store, one.before, fingerprint) for one in targets):
            assert main.before is not None
            return _Built(main.before, True)
        survey(opened, ledger, data, main.store)
        try:
            check_rejects(ledger, data, f"{main.store.url}/{REJECTS}")
            _check_parts(ledger, targets, data)
        except DataError:
            if main.before is None:
                write_rejects(main.store, ledger.rejects())
            raise
        for one in targets:
            if one.before is not None:
                refuse_other_images(one.store, one.before, _plans(ledger, one, data, prefix))
        manifests = [
            _write(ledger, one, opened, data, prefix=prefix, fingerprint=fingerprint)
            for one in targets
        ]
        note = f" with {_num_persons(ledger)} persons" if prefix == SCENES else ""
        if len(manifests) > 1:
            note = f" and {manifests[0].num_samples} for validation"
        return _Built(manifests[-1], False, note)


def _open(url: str, data: Data, storage: Storage, prefix: str) -> Source:
    source = open_source(url, data, storage)
    if prefix == SCENES and isinstance(source, FolderSource):
        return SceneFolder(source, open_store(url, storage))
    return source


def _policy_for(prefix: str, data: Data) -> Data:
    """The settings for one kind of images: only persons are cut out and split."""
    if prefix == PERSONS:
        return data
    plain = {name: Data.model_fields[name].default for name in ("names", "validation_fraction")}
    return data.model_copy(update={**plain, "persons": "scenes"})


def _policy(data: Data) -> str:
    """What the shards depend on beside their sources, as one line."""
    line = f"{POLICY_VERSION} {data.samples_per_shard} {data.min_side} {data.max_pixels}"
    more = data.model_dump(include=POLICY_KEYS, exclude_defaults=True)
    return f"{line} {json.dumps(more, sort_keys=True)}" if more else line


def _targets(dest: str, data: Data, storage: Storage) -> list[_Target]:
    """What to publish, in this order: the data set to learn from comes last."""
    urls = {TRAIN: dest}
    if data.validation_fraction:
        urls = {VALIDATION: f"{dest.rstrip('/')}/{VALIDATION_FOLDER}", **urls}
    stores = {part: open_store(url, storage) for part, url in urls.items()}
    return [_Target(store, part, published(store)) for part, store in stores.items()]


def _check_parts(ledger: Ledger, targets: Sequence[_Target], data: Data) -> None:
    for one in targets:
        if not ledger.num_samples(one.part):
            name = "validation" if one.part == VALIDATION else "pretraining"
            raise DataError(
                f"data.validation_fraction={data.validation_fraction:g} leaves none of "
                f"{ledger.num_samples()} images for {name}: accepted is a share that leaves some"
            )


def _plans(ledger: Ledger, target: _Target, data: Data, prefix: str) -> Iterator[ShardPlan]:
    return plan_shards(ledger.samples(target.part, data.samples_per_shard), prefix)


def _write(
    ledger: Ledger,
    target: _Target,
    opened: Sequence[Source],
    data: Data,
    *,
    prefix: str,
    fingerprint: str,
) -> Manifest:
    def read(sample: Sample) -> bytes:
        if sample.spooled >= 0:
            return ledger.spool.read(sample.spooled, sample.size)
        contents = opened[sample.source].read(sample.picture)
        try:
            return sample_bytes(contents, sample.box, data)
        except DataError:
            return b""  # no longer the picture that was surveyed: refused by its key

    num_samples = ledger.num_samples(target.part)
    rejected = Counter(dict(ledger.counts)) + _left_out(opened)
    what = ShardSet(
        prefix,
        -(-num_samples // data.samples_per_shard),
        tuple(sorted(rejected.items())) if target.part == TRAIN else (),
        fingerprint,
        {"boxes": []} if prefix == SCENES else {},
    )
    return write_shards(
        what,
        _plans(ledger, target, data, prefix),
        ledger.rejects() if target.part == TRAIN else (),
        target.store,
        read,
        num_writers=num_writers([target.store.url, *(source.url for source in opened)]),
    )


def _left_out(opened: Sequence[Source]) -> Counter[str]:
    """What adapters passed over by their own rules (junk, crowds), which never became an item."""
    counts: Counter[str] = Counter()
    for source in opened:
        for reason, count in getattr(source, "left_out", {}).items():
            counts[f"left out: {reason}"] += count
    return counts


def _num_persons(ledger: Ledger) -> int:
    return sum(
        len(json.loads(sample.facts).get("boxes", ()))
        for samples in ledger.samples(TRAIN, 1024)
        for sample in samples
        if sample.facts
    )


def _refuse_overlap(sources: Sequence[str], dest: str) -> None:
    target = _local(dest)
    for source in sources:
        folder = _local(source)
        if folder is not None and target is not None and target.is_relative_to(folder):
            raise ConfigError(
                f"shards {dest!r} lie inside the source folder {source!r}: choose a place outside"
            )


def _local(url: str) -> Path | None:
    path = local_path(url)
    return None if path is None else path.resolve()


def _summary(built: _Built, what: str) -> str:
    manifest = built.manifest
    rejected = sum(count for _reason, count in manifest.rejected)
    tail = f", {rejected} files rejected" if rejected else ""
    return f"{manifest.num_samples} {what} in {len(manifest.shards)} shards{tail}{built.note}"
