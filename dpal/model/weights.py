"""Weights files: read without running code, unwrapped, and loaded strictly into a module.

Everything in a file is accounted for: a tensor is loaded, left out by name (a classifier's, and
what a published layout is known to hold besides the backbone, which is counted), or an error.
"""

import argparse
import functools
import logging
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dpal.base.errors import ConfigError

WRAPPERS = ("model", "state_dict", "teacher")  # a self-distilled file's teacher, not its student
HEADS = ("head.", "head_dist.", "classifier.", "fc.")  # a classifier may be left out
PREFIXES = ("module.", "backbone_module.", "backbone.")
ACCEPTED = "accepted are .safetensors files and torch state dicts"


class WeightsFile(NamedTuple):
    """What a file holds.

    Attributes:
        container: "safetensors" or "torch".
        wrappers: keys that lead to the state dict, outermost first.
        beside: other top-level keys, next to the state dict (optimiser, epoch, ...).
        state: the state dict, as named in the file.
        metadata: text that a safetensors file carries.
    """

    path: Path
    container: str
    wrappers: tuple[str, ...]
    beside: tuple[str, ...]
    state: dict[str, Any]
    metadata: dict[str, str]


class Bare(NamedTuple):
    """A state dict without the wrappers of its training.

    Attributes:
        state: what has to be loaded, under the backbone's own names.
        dropped: tensors that are left out on purpose, by the first word of their name.
        prefixes: what was cut from the front of names.
    """

    state: dict[str, Any]
    dropped: dict[str, int]
    prefixes: tuple[str, ...]


def open_weights(path: Path) -> WeightsFile:
    """Read a safetensors file or a torch file without code. Raises ConfigError."""
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        else:
            # the arguments of a training script: a bag of values, nothing that runs
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        what = "holds pickled code, which is never run" if _is_torch(path) else "is no torch file"
        raise ConfigError(f"{path}: {what}; {ACCEPTED}") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        first = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{path}: cannot be read ({first[0]}); {ACCEPTED}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; {ACCEPTED}")
    wrappers: list[str] = []
    beside: list[str] = []
    while wrapper := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None):
        wrappers.append(wrapper)
        beside += [str(key) for key in content if key != wrapper]
        content = content[wrapper]
    container = "safetensors" if path.suffix == ".safetensors" else "torch"
    return WeightsFile(path, container, tuple(wrappers), tuple(beside), content, metadata)


def read_weights(path: Path) -> dict[str, Any]:
    """State dict of a safetensors file or a torch file without code. Raises ConfigError."""
    return open_weights(path).state


def weights_path(weights: str) -> Path:
    """The file as a path. Raises ConfigError when it does not exist."""
    if not Path(weights).is_file():
        raise ConfigError(f"teacher.weights={weights!r} does not exist")
    return Path(weights)


def bare(
    state: dict[str, Any],
    source: Path,
    *,
    prefixes: Iterable[str] = PREFIXES,
    droppable: Iterable[str] = (),
) -> Bare:
    """Cut training prefixes off the names, and leave out what belongs to no backbone.

    Args:
        prefixes: cut from the front of a name, in any order, as long as one fits.
        droppable: beginnings of names, after the cut, that are left out and counted.

    Raises:
        ConfigError: when two names become one.
    """
    cut, prefixes, droppable = set(), tuple(prefixes), tuple(droppable)
    kept: dict[str, Any] = {}
    dropped: dict[str, int] = {}
    for name, value in state.items():
        key = str(name)
        while prefix := next((p for p in prefixes if key.startswith(p)), None):
            key = key.removeprefix(prefix)
            cut.add(prefix)
        if key.startswith(droppable):
            group = key.split(".")[0]
            dropped[group] = dropped.get(group, 0) + 1
        elif key in kept:
            raise ConfigError(f"{source}: two tensors are named {key} once prefixes are cut off")
        else:
            kept[key] = value
    return Bare(kept, dropped, tuple(p for p in prefixes if p in cut))


def load_strictly(
    model: nn.Module,
    state: dict[str, Any],
    source: Path,
    *,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Load `state`; every key must match but those of a classifier.

    Args:
        name_in_file: the name in `state` of a name in `model`, so that errors speak the file's
            language.

    Raises:
        ConfigError: naming what is missing, unexpected, or of another shape.
    """
    wanted = {name_in_file(key): (key, tensor) for key, tensor in model.state_dict().items()}
    state = {key: value for key, value in state.items() if key in wanted or not _is_head(key)}
    faults = [f"missing {key}" for key in sorted(wanted.keys() - state.keys())]
    faults += [f"unexpected {key}" for key in sorted(state.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & state.keys()):
        shape, right = getattr(state[key], "shape", None), wanted[key][1].shape
        if shape != right:
            have = "no tensor" if shape is None else list(shape)
            faults.append(f"{key} is {have}, not {list(right)}")
    if faults:
        more = f", and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ConfigError(
            f"{source}: does not fit {type(model).__name__}: {', '.join(faults[:20])}{more}"
        )
    model.load_state_dict({wanted[key][0]: value for key, value in state.items()})


def tensor_of(state: dict[str, Any], key: str, source: Path, ndim: int) -> Tensor:
    """`state[key]`, from which sizes are read. Raises ConfigError when it is not such a tensor."""
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise ConfigError(f"{source}: missing {key}")
    if value.ndim != ndim:
        raise ConfigError(f"{source}: {key} is {list(value.shape)}, not of {ndim} axes")
    return value


def count_of(state: dict[str, Any], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group finds at the front of a name."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


@functools.cache
def warn_once(text: str) -> None:
    """Say one line on stderr, the first time only."""
    logging.getLogger("dpal").warning(text)


def _is_torch(path: Path) -> bool:
    """Whether a file begins as `torch.save` writes it: a zip archive, or a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _is_head(key: str) -> bool:
    return key.startswith(HEADS)
