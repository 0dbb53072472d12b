"""Frozen teachers: uint8 views in, one global vector and a patch map on the student's grid out.

A `Teacher` wraps a network (`dpal.model.networks`) with everything a recipe decides: input size,
pixel statistics, and the grid of the targets. `teacher_identity` says who it is without building
it.

Legend: B images, H x W view pixels, D teacher width, N student patches.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpal.base.errors import ConfigError
from dpal.base.teachers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MobileSamTeacher,
    OnnxTeacher,
    SapiensTeacher,
    SoliderTeacher,
    TaughtTeacher,
    TimmTeacher,
)
from dpal.model import timm_teacher
from dpal.model.networks import Network, PublishedSpec, Spec, build_network, taught_file
from dpal.model.tokens import Tokens
from dpal.model.weights import weights_path

TEACHER_VERSION = 1  # raise it whenever the same weights and pixels would give other tokens
AVERAGE = "average where whole"


class Teacher:
    """A frozen teacher as a `FrozenBackbone`.

    A view is resized (bicubic, antialiased) by the factors that bring a base view to
    the teacher's input, so a square composite stays square in the teacher's scale. A map on
    another grid than the student's is resampled (bilinear, antialiased); an equal one is untouched.
    Published teachers' maps are averaged instead where whole patches make up a patch of the
    student.

    Attributes:
        width: D.
        stride: pixels of a view behind one target token, in both directions.
        identity: everything besides the views that decides the tokens.
    """

    def __init__(
        self,
        network: Network,
        identity: dict[str, Any],
        *,
        stride: int,
        view_size: tuple[int, int],
    ) -> None:
        self.network, self.identity = network, identity
        self.width, self.stride, self.view_size = network.width, stride, view_size
        self.input: tuple[int, int] = tuple(identity["input"])
        for side in (*self.input, *self.input_size((view_size[0], view_size[0]))):
            if side % network.multiple:
                raise ConfigError(
                    f"teacher.input={list(self.input)}: with views of {list(view_size)} the "
                    f"teacher sees a side of {side} pixels; accepted are multiples of "
                    f"{network.multiple} for the base view and the square composite"
                )
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network to `device` and return self."""
        self.device = torch.device(device)
        self.network.to(self.device)
        return self

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a view of `size` is fed with."""
        pairs = zip(size, self.input, self.view_size, strict=True)
        height, width = (round(side * fed / base) for side, fed, base in pairs)
        return height, width

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tokens:
        """Tokens of uint8 views [B, H, W, 3], float32, on the teacher's device."""
        size = (pixels.shape[1], pixels.shape[2])
        planes = pixels.to(self.device).permute(0, 3, 1, 2).float()  # [B, 3, H, W]
        fed = self.input_size(size)
        if fed != size:
            planes = F.interpolate(planes, fed, mode="bicubic", antialias=True).clamp_(0, 255)
        mean = planes.new_tensor(self.identity["mean"]).mul(255).view(3, 1, 1)
        std = planes.new_tensor(self.identity["std"]).mul(255).view(3, 1, 1)
        cls, dense = self.network((planes - mean) / std)
        grid = (size[0] // self.stride, size[1] // self.stride)
        dense = dense.float()
        if dense.shape[2:] != grid:
            dense = self._on_grid(dense, grid)
        return Tokens(cls.float(), dense.flatten(2).transpose(1, 2).contiguous())

    def _on_grid(self, dense: Tensor, grid: tuple[int, int]) -> Tensor:
        """A map [B, D, h, w] on another `grid`."""
        whole = dense.shape[2] % grid[0] == 0 and dense.shape[3] % grid[1] == 0
        if whole and self.identity.get("resample") == AVERAGE:
            return F.adaptive_avg_pool2d(dense, grid)
        return F.interpolate(dense, grid, mode="bilinear", antialias=True)


def build_teacher(
    spec: Spec,
    *,
    stride: int,
    view_size: tuple[int, int],
    taught_weights: Path | None = None,
) -> Teacher:
    """The teacher of a recipe, frozen, on the CPU.

    Args:
        stride: pixels of a view behind one target token.
        view_size: height and width of the base view.
        taught_weights: weights of the taught teacher (`kind: taught` only).

    Raises:
        ConfigError: when weights, name, tap, outputs and input do not fit together.
        StorageError: when weights by name cannot be fetched.
    """
    identity = teacher_identity(spec, taught_weights, view_size=view_size)
    network = build_network(spec, taught_weights)
    return Teacher(network, identity, stride=stride, view_size=view_size)


def teacher_identity(
    spec: Spec, taught_weights: Path | None = None, *, view_size: tuple[int, int]
) -> dict[str, Any]:
    """Who a teacher is, as JSON values, from its weights file alone: cheap, nothing is built.

    Raises:
        ConfigError, DataError: when the weights file is not there.
        StorageError: when weights by name cannot be fetched.
    """
    common = {"definition": TEACHER_VERSION, "kind": spec.kind}
    if isinstance(spec, TaughtTeacher):
        return {
            **common,
            "weights": sha256_of(taught_file(taught_weights)),
            "tap": "norm",
            "input": list(view_size),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "precision": spec.precision,
            "library": _library("timm"),
        }
    seen = {"input": list(spec.input), "mean": list(spec.mean), "std": list(spec.std)}
    if isinstance(spec, OnnxTeacher):
        return {
            **common,
            **seen,
            "weights": sha256_of(weights_path(spec.weights)),
            "outputs": [spec.global_output, spec.dense_output],
            "precision": "fp32",
            "library": _library("onnxruntime"),
        }
    if not isinstance(spec, TimmTeacher):
        return {**common, **seen, **_published(spec)}
    return {
        **common,
        **seen,
        "name": spec.name,
        "weights": sha256_of(timm_teacher.weights_file(spec.name, spec.weights)),
        "tap": spec.tap,
        "precision": spec.precision,
        "library": _library("timm"),
        **_runtime(spec),
    }


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _published(spec: PublishedSpec) -> dict[str, Any]:
    """What, besides kind and input, decides the tokens of a teacher with a file of its own."""
    identity: dict[str, Any] = {
        "weights": sha256_of(weights_path(spec.weights)),
        "precision": spec.precision,
        "resample": AVERAGE,
        "library": _library("timm"),
    }
    if not isinstance(spec, MobileSamTeacher):
        identity["tap"] = spec.tap
    else:
        identity |= _runtime(spec)
    if isinstance(spec, SapiensTeacher):
        identity["padding"] = spec.padding
    if isinstance(spec, SoliderTeacher):
        identity["semantic_weight"] = spec.semantic_weight
    return identity


def _runtime(spec: TimmTeacher | MobileSamTeacher) -> dict[str, str]:
    """Absent for torch, as in caches that were made before there was another."""
    return {} if spec.runtime == "torch" else {"runtime": _library(spec.runtime)}


def _library(name: str) -> str:
    return f"{name} {'.'.join(version(name).split('.')[:2])}"
