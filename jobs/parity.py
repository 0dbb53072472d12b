"""The parity gate: a cached run starts when its targets are what the teachers say here and now.

Random samples are read, decoded and rendered as in training, the teachers of the recipe look at
them on this machine, and the answers are compared with the records (`dpal.parity`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_tools.backgrounds import BackgroundPool, load_backgrounds
from data_tools.feature_cache import TargetCache, finished_part, open_cache
from data_tools.manifest import Manifest, manifest_of
from data_tools.software import differences, software
from dpal.base.errors import EXIT_DONE, ConfigError, DataError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.caching.plan import definition_of, single_teacher_recipes, teacher_names
from jobs.comparing.figures import TeacherParity
from jobs.comparing.meter import ParityMeter
from jobs.comparing.places import draw_places
from jobs.publish import read_record, write_text


def require_parity(
    recipe: Recipe,
    manifest: Manifest,
    pool: BackgroundPool,
    caches: Sequence[TargetCache],
    step: int = 0,
) -> str:
    """Raise DataError unless stored targets are the teachers'; returns a line about it.

    What passed is noted in the run folder, and not compared again while caches, software and
    machine are the same. The teachers are loaded one by one, and freed.

    Args:
        manifest: shards that the run learns from.
        caches: of every teacher, in order.
        step: that the run starts from; each draws other samples.
    """
    samples = recipe.train.parity_samples
    if not samples or not caches:
        return ""
    marker = _marker(recipe, caches)
    path = RunLayout(recipe.run_dir).parity
    if read_record(path).get("marker") == marker:
        return "parity: cached targets were compared with the teacher before, on this machine"
    found = _measure(recipe, manifest, pool, caches, samples, step)
    for single, cache, one in zip(single_teacher_recipes(recipe), caches, found, strict=True):
        if not one.passed:
            raise DataError(_failure(single, pool, cache, one))
    text = {"marker": marker, "measured": [as_plain(one) for one in found]}
    write_text(path, json.dumps(text, indent=1) + "\n")
    return "\n".join(_line(name, one) for name, one in _named(recipe, found))


def run_parity(recipe: Recipe, samples: int, seed: int = 0, json_file: Path | None = None) -> int:
    """Compare every teacher's cache as far as it is finished; print a line for each.

    Returns 0, or 3 when one of the caches is not what its teacher says.

    Raises:
        ConfigError: for a method without targets.
        DataError: when no shard is finished, or the cache is of something else.
    """
    if samples < 1:
        raise ConfigError(f"-n {samples}: accepted is 1 and more")
    if not recipe.aligned_teachers:
        raise ConfigError(f"method.kind={recipe.method.kind} has no targets to compare")
    manifest, pool = manifest_of(recipe), load_backgrounds(recipe)
    singles = single_teacher_recipes(recipe)
    caches = [open_cache(one, definition_of(one, manifest, pool)) for one in singles]
    part = finished_part(manifest, caches)
    found = _measure(recipe, part, pool, caches, samples, seed)
    failures = []
    for (name, one), single, cache in zip(_named(recipe, found), singles, caches, strict=True):
        print(_line(name, one))
        for term, error in one.loss_errors.items():
            stored, online = one.losses[term]
            print(f"  {term}: {stored:.5g} stored, {online:.5g} online, {error:.2%} apart")
        if not one.passed:
            failures.append(_failure(single, pool, cache, one))
    if json_file is not None:
        rows = [{"name": name, **as_plain(one)} for name, one in _named(recipe, found)]
        write_text(json_file, json.dumps({"teachers": rows, "failures": failures}, indent=1) + "\n")
    for failure in failures[1:]:
        print(failure)
    if failures:
        raise DataError(failures[0])
    return EXIT_DONE


def as_plain(one: TeacherParity) -> dict[str, Any]:
    """A comparison as JSON values."""
    return {
        **asdict(one),
        "accepted": one.accepted._asdict(),
        "loss_errors": one.loss_errors,
        "passed": one.passed,
    }


def _measure(
    recipe: Recipe,
    manifest: Manifest,
    pool: BackgroundPool,
    caches: Sequence[TargetCache],
    samples: int,
    seed: int,
) -> list[TeacherParity]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = draw_places(recipe, manifest, samples, seed)
    with _same_chance_after(device):
        return [
            ParityMeter(single, manifest, pool, cache, device).measure(places)
            for single, cache in zip(single_teacher_recipes(recipe), caches, strict=True)
        ]


@contextmanager
def _same_chance_after(device: str) -> Iterator[None]:
    """Building networks draws random numbers: training must not notice."""
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _named(recipe: Recipe, found: Sequence[TeacherParity]) -> list[tuple[str, TeacherParity]]:
    return list(zip(teacher_names(recipe), found, strict=True))


def _line(name: str, one: TeacherParity) -> str:
    losses = max(one.loss_errors.values())
    return (
        f"parity: {name}: {one.samples} samples, {one.tokens} tokens against the teacher in "
        f"{one.seconds:.1f} s: cosine {one.median_cosine:.6f} (smallest "
        f"{one.smallest_cosine:.6f}), {one.largest_steps:.2g} steps apart at most; the codec's "
        f"own cosine {one.codec_cosine:.5f}, losses {losses:.2%} apart at most"
    )


def _failure(recipe: Recipe, pool: BackgroundPool, cache: TargetCache, one: TeacherParity) -> str:
    """One sentence: which record, by how much, and what differs between then and now."""
    accepted = one.accepted
    return (
        f"targets in {one.cache!r} are not what the teacher says here: {one.worst} is the worst, "
        f"with smallest cosine {one.smallest_cosine:.5f} (accepted {accepted.smallest:.5f}), "
        f"median {one.median_cosine:.5f} (accepted {accepted.median:.5f}) and a largest difference "
        f"of {one.largest_steps:.3g} steps, {one.largest_excess:.3g} times what is accepted; "
        f"{_what_differs(recipe, pool, cache)}"
    )


def _what_differs(recipe: Recipe, pool: BackgroundPool, cache: TargetCache) -> str:
    now = definition_of(recipe, manifest_of(recipe), pool)
    fields = now.differences(cache.header.definition)
    if fields:
        return f"the cache's header differs from this run in {', '.join(fields)}"
    made_with = cache.software()
    changed = differences(software(), made_with)
    if changed:
        told = f"but it was made with other software: {', '.join(changed)}"
    elif made_with:
        told = "and it was made with this very software, so look at the hardware and its precision"
    else:
        told = "so look at libraries, hardware and precision"
    return (
        f"every field of its header agrees with this run, {told}; `dpal audit` tells damaged "
        "records, and without the folder `dpal cache` makes it anew"
    )


def _marker(recipe: Recipe, caches: Sequence[TargetCache]) -> dict[str, Any]:
    """What a comparison holds for: caches, software, machine, and how pixels are rendered."""
    headers = [hashlib.sha256(cache.header.to_json()).hexdigest() for cache in caches]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "headers": headers,
        "software": software(),
        "device": device,
        "render": recipe.train.render,
        "samples": recipe.train.parity_samples,
    }
