"""From a recipe's `teacher` section to a frozen network: one line for every kind.

Legend: B images, D width, gh x gw token grid.
"""

from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from dpal.base.errors import ConfigError, DataError
from dpal.base.teachers import (
    MobileSamTeacher,
    OnnxTeacher,
    SapiensTeacher,
    SoliderTeacher,
    TaughtTeacher,
    TimmTeacher,
    VitTeacher,
)
from dpal.model import onnx_teacher, timm_teacher
from dpal.model.conv_teacher import ConvNetwork
from dpal.model.exported_network import ExportedNetwork
from dpal.model.published.mobilesam import load_mobilesam, mobilesam_network
from dpal.model.published.solider import STAGES, SoliderNetwork, load_solider
from dpal.model.published.vit import load_vit
from dpal.model.timm_teacher import DTYPES
from dpal.model.weights import read_weights, warn_once, weights_path

PublishedSpec = VitTeacher | SapiensTeacher | SoliderTeacher | MobileSamTeacher
Spec = TaughtTeacher | TimmTeacher | OnnxTeacher | PublishedSpec


class Network(Protocol):
    """A frozen network: normalised float [B, 3, h, w] to CLS [B, D] and a map [B, D, gh, gw].

    `multiple` is what h and w must be a multiple of.
    """

    width: int
    multiple: int

    def __call__(self, planes: Tensor) -> tuple[Tensor, Tensor]: ...
    def to(self, device: torch.device) -> None:
        """Move the weights."""
        ...


def build_network(spec: Spec, taught_weights: Path | None = None) -> Network:
    """The network of a teacher, frozen, on the CPU, strictly loaded.

    Raises:
        ConfigError: when weights, name, tap and outputs do not fit together.
        DataError: when the taught teacher was not taught yet.
        StorageError: when weights by name cannot be fetched.
    """
    if isinstance(spec, OnnxTeacher):
        network: object = onnx_teacher.OnnxNetwork(
            Path(spec.weights), spec.global_output, spec.dense_output, spec.input
        )
    elif isinstance(spec, TaughtTeacher):
        network = timm_teacher.taught_network(taught_file(taught_weights), spec.precision)
    elif isinstance(spec, TimmTeacher):
        path = timm_teacher.weights_file(spec.name, spec.weights)
        network = timm_teacher.timm_network(spec.name, path, spec.tap, spec.input, spec.precision)
        if spec.runtime == "onnxruntime":
            network = _exported(spec.name, network)
    else:
        network = _published(spec)
    return cast(Network, network)


def taught_file(path: Path | None) -> Path:
    """The taught teacher's weights. Raises DataError when they do not exist."""
    if path is None or not path.is_file():
        raise DataError(f"the taught teacher {str(path)!r} does not exist; teach it first")
    return path


def _exported(name: str, network: object) -> ExportedNetwork:
    if not isinstance(network, ConvNetwork):
        raise ConfigError(
            f"teacher.runtime='onnxruntime' with teacher.name={name!r}: accepted are convolutional "
            "networks; a transformer takes 'torch'"
        )
    return ExportedNetwork(network)


def _published(spec: PublishedSpec) -> object:
    path = weights_path(spec.weights)
    state = read_weights(path)
    if isinstance(spec, MobileSamTeacher):
        encoder = mobilesam_network(load_mobilesam(state, path)[0], DTYPES[spec.precision])
        return ExportedNetwork(encoder) if spec.runtime == "onnxruntime" else encoder
    if isinstance(spec, SoliderTeacher):
        stage = STAGES - 1 if spec.tap == "norm" else int(spec.tap.removeprefix("stage"))
        model = load_solider(state, path)[0]
        return SoliderNetwork(model, stage, spec.semantic_weight, DTYPES[spec.precision])
    padding = spec.padding if isinstance(spec, SapiensTeacher) else 0
    loaded = load_vit(spec.kind, state, path, padding=padding)
    if loaded.positions.warning:
        warn_once(f"{path}: {loaded.positions.warning}")
    return timm_teacher.TimmNetwork(loaded.model, spec.tap, spec.precision)
