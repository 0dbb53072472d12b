"""Committed state of a run: whole float32 tensors by name, independent of ranks and ZeRO stage.

    checkpoints/step-00000300/
        student.safetensors   decoder.safetensors      weights by part; `average` if there is one
        exp_avg.safetensors   exp_avg_sq.safetensors   Adam moments
        state.json                                     step, recipe values, SHA-256 of each file
        COMMITTED                                      SHA-256 of state.json; written last

A folder without a valid `COMMITTED` is never loaded, and is removed by the next commit.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.engine import EngineState

MARKER = "COMMITTED"
_MOMENT_FILES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk.

    Attributes:
        path: its folder.
        step: optimiser steps done.
        science: what the run learns from and how, by dotted key; see `jobs.train.science_of`.
        files: SHA-256 by file name.
    """

    path: Path
    step: int
    science: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Identity of the content: 16 hex digits."""
        return hashlib.sha256(json.dumps(dict(self.files), sort_keys=True).encode()).hexdigest()[
            :16
        ]


def latest(folder: Path) -> Checkpoint | None:
    """The committed checkpoint with the highest step, or None."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        checkpoint = _committed(candidate)
        if checkpoint is not None:
            return checkpoint
    return None


def commit(folder: Path, state: EngineState, science: Mapping[str, Any], keep: int) -> Checkpoint:
    """Write `state` as a checkpoint, mark it, then remove all but the `keep` newest.

    Raises:
        StorageError: when the disk is full or not writable; nothing half-written stays.
    """
    target = folder / f"step-{state.step:08d}"
    existing = _committed(target)
    if existing is not None:
        return existing
    try:
        _write(target, state, science)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        reason = "the disk is full" if full else str(error)
        raise StorageError(f"checkpoint {target} could not be written: {reason}") from None
    _remove_old(folder, keep)
    written = _committed(target)
    assert written is not None, "a checkpoint that was just committed must read back"
    return written


def load(checkpoint: Checkpoint) -> EngineState:
    """Read a checkpoint and verify every file. Raises DataError for a damaged one."""
    for name, digest in checkpoint.files.items():
        if _sha256(checkpoint.path / name) != digest:
            raise DataError(f"checkpoint {checkpoint.path}: {name} does not match its checksum")

    def read(name: str) -> dict[str, Any]:
        return load_file(checkpoint.path / f"{name}.safetensors")

    names = (name.removesuffix(".safetensors") for name in checkpoint.files)
    parameters = {
        f"{part}.{name}": tensor
        for part in names
        if part not in _MOMENT_FILES
        for name, tensor in read(part).items()
    }
    exp_avg, exp_avg_sq = (read(name) for name in _MOMENT_FILES)
    return EngineState(checkpoint.step, parameters, exp_avg, exp_avg_sq)


def check_same_science(checkpoint: Checkpoint, science: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the keys, when a recipe differs from the checkpoint's."""
    changed = [
        f"{key} ({checkpoint.science.get(key)!r} there, {science.get(key)!r} here)"
        for key in sorted(checkpoint.science.keys() | science.keys())
        if checkpoint.science.get(key) != science.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint.path} was written by another recipe: {', '.join(changed)}; "
            "choose another name, or remove the run folder"
        )


def _write(target: Path, state: EngineState, science: Mapping[str, Any]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = {}
    for name, tensors in _split(state).items():
        path = target / f"{name}.safetensors"
        save_file(tensors, path)
        _sync(path)
        files[path.name] = _sha256(path)
    record = {"step": state.step, "science": dict(science), "files": files}
    text = json.dumps(record, indent=1, sort_keys=True).encode()
    (target / "state.json").write_bytes(text)
    _sync(target / "state.json")
    aside = target / f"{MARKER}.tmp"
    aside.write_text(hashlib.sha256(text).hexdigest())
    _sync(aside)
    os.replace(aside, target / MARKER)
    _sync(target)


def _split(state: EngineState) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in state.parameters.items():
        part, _, inner = name.partition(".")
        parts.setdefault(part, {})[inner] = tensor.contiguous()
    for moment in _MOMENT_FILES:
        values = getattr(state, moment)
        parts[moment] = {name: tensor.contiguous() for name, tensor in values.items()}
    return parts


def _committed(folder: Path) -> Checkpoint | None:
    try:
        marker = (folder / MARKER).read_text()
        text = (folder / "state.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if hashlib.sha256(text).hexdigest() != marker:
        return None
    record = json.loads(text)
    return Checkpoint(folder, record["step"], record["science"], record["files"])


def _remove_old(folder: Path, keep: int) -> None:
    committed = [path for path in sorted(folder.glob("step-*")) if _committed(path) is not None]
    for path in committed[:-keep]:
        (path / MARKER).unlink()  # first, so that a half-removed folder is never loaded
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
