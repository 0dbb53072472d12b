"""The `teacher` section of a recipe: one class for every family of frozen teachers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpal.base.section import Pair, Section, Triple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class TaughtTeacher(Section):
    """A small ViT taught on the synthetic persons' own labels (identity, attributes, parts)."""

    kind: Literal["taught"]
    width: int = Field(192, ge=32, description="embedding width of the ViT")
    depth: int = Field(6, ge=1, description="number of blocks")
    heads: int = Field(6, ge=1, description="attention heads")
    steps: int = Field(400, ge=1, description="optimiser steps it is taught for")
    global_batch: int = Field(64, ge=2, description="images in one step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the forward")
    batch_size: int = Field(32, ge=1, description="images in one teacher forward")


class TimmTeacher(Section):
    """Any ViT, Swin or convolutional network of timm, from a local file or by name from the hub."""

    kind: Literal["timm"]
    name: str = Field(description="timm model name, e.g. vit_small_patch14_dinov2.lvd142m")
    weights: str = Field("", description="local weights file; empty: fetched by name")
    tap: str = Field(
        "norm",
        pattern=r"^(norm|block\d+|stage\d+)$",
        description="'norm' (after the final norm), 'block7' (output of block 7 of a ViT, 0-based) "
        "or 'stage2' (of a Swin or a convolutional network: the map of stride 16; stage k has "
        "stride 4 * 2 ** k, so layer3 of a ResNet is stage2)",
    )
    input: Pair = Field((256, 128), description="height and width the teacher is fed with")
    mean: Triple = Field(IMAGENET_MEAN, description="RGB mean, pixels in 0..1")
    std: Triple = Field(IMAGENET_STD, description="RGB standard deviation, pixels in 0..1")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the forward")
    batch_size: int = Field(32, ge=1, description="images in one teacher forward")
    runtime: Literal["torch", "onnxruntime"] = Field(
        "torch",
        description="what runs the forward; onnxruntime, in fp32, is faster for convolutional "
        "networks on a CPU",
    )

    @model_validator(mode="after")
    def _fits(self) -> "TimmTeacher":
        _require_fp32(self.runtime, self.precision)
        return self


class OnnxTeacher(Section):
    """Any ONNX network with a global vector and a dense map, run by ONNX Runtime."""

    kind: Literal["onnx"]
    weights: str = Field(description="local .onnx file")
    global_output: str = Field(description="name of the output with the global vector [B, D]")
    dense_output: str = Field(description="name of the output with the dense map [B, D, h, w]")
    input: Pair = Field((256, 128), description="height and width the teacher is fed with")
    mean: Triple = Field(IMAGENET_MEAN, description="RGB mean, pixels in 0..1")
    std: Triple = Field(IMAGENET_STD, description="RGB standard deviation, pixels in 0..1")
    batch_size: int = Field(32, ge=1, description="images in one teacher forward")


class Published(Section):
    """What every teacher with a published file of its own has in common."""

    weights: str = Field(description="local weights file; its sizes are read from its tensors")
    input: Pair = Field((256, 128), description="height and width the teacher is fed with")
    mean: Triple = Field(IMAGENET_MEAN, description="RGB mean, pixels in 0..1")
    std: Triple = Field(IMAGENET_STD, description="RGB standard deviation, pixels in 0..1")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the forward")
    batch_size: int = Field(32, ge=1, description="images in one teacher forward")


class VitTeacher(Published):
    """A plain ViT in the layout of PATH, MAE, HAP, PASS or UniHCP.

    The last block of published PATH files is probably untrained: their 'norm' is about block 10
    through MAE's norm, 'block10' is the last block that was taught (see `dpal inspect`).
    """

    kind: Literal["path", "mae", "hap", "pass", "unihcp"]
    tap: str = Field(
        "norm",
        pattern=r"^(norm|block\d+)$",
        description="'norm' (after the final norm) or 'block7' (output of block 7, 0-based)",
    )


class SapiensTeacher(Published):
    """A Sapiens ViT in mmpretrain's names, fed large and pooled to the student's grid."""

    kind: Literal["sapiens"]
    input: Pair = Field((1024, 512), description="height and width the teacher is fed with")
    tap: str = Field(
        "norm",
        pattern=r"^(norm|block\d+)$",
        description="'norm' (after the final norm) or 'block7' (output of block 7, 0-based)",
    )
    padding: Literal[0, 2] = Field(
        0, description="patch padding: 0 (pre-trained files) or 2 (files fine-tuned for a task)"
    )
    batch_size: int = Field(4, ge=1, description="images in one teacher forward")


class SoliderTeacher(Published):
    """A SOLIDER Swin, steered between appearance (0) and semantics (1)."""

    kind: Literal["solider"]
    tap: str = Field(
        "norm",
        pattern=r"^(norm|stage[0-3])$",
        description="'norm' or 'stage3' (last stage, stride 32), 'stage2' (stride 16), ...",
    )
    semantic_weight: float = Field(
        1.0, ge=0, le=1, description="semantic weight; recorded in the identity of the targets"
    )


class MobileSamTeacher(Published):
    """MobileSAM's image encoder with its neck: a dense teacher of 256 channels.

    Its windows hold 14 x 14 and 7 x 7 patches of 16 pixels: a multiple of 224 x 112 is tiled by
    whole windows, any other input is padded inside the network.
    """

    kind: Literal["mobilesam"]
    input: Pair = Field(
        (256, 128),
        description="height and width the teacher is fed with; 448 x 224 is finer and slower",
    )
    runtime: Literal["torch", "onnxruntime"] = Field(
        "torch", description="what runs the forward; onnxruntime is twice as fast on a CPU, in fp32"
    )

    @model_validator(mode="after")
    def _fits(self) -> "MobileSamTeacher":
        _require_fp32(self.runtime, self.precision)
        return self


Teacher = Annotated[
    TaughtTeacher
    | TimmTeacher
    | OnnxTeacher
    | VitTeacher
    | SapiensTeacher
    | SoliderTeacher
    | MobileSamTeacher,
    Field(discriminator="kind"),
]


def teacher_name(teacher: Teacher) -> str:
    """What a teacher is called: the network, or else the weights file, or else the kind."""
    return (
        getattr(teacher, "name", "") or Path(getattr(teacher, "weights", "")).stem or teacher.kind
    )


def _require_fp32(runtime: str, precision: str) -> None:
    if runtime == "onnxruntime" and precision != "fp32":
        raise ValueError(
            f"teacher.precision={precision!r} with teacher.runtime='onnxruntime': "
            "accepted is 'fp32'"
        )
