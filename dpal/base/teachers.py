"""The `teacher` section of a recipe: one class for every kind of frozen teacher."""

from typing import Annotated, Literal

from pydantic import Field

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
    """Any timm ViT, from a local file or by name from the hub."""

    kind: Literal["timm"]
    name: str = Field(description="timm model name, e.g. vit_small_patch14_dinov2.lvd142m")
    weights: str = Field("", description="local weights file; empty: fetched by name")
    tap: str = Field(
        "norm",
        pattern=r"^(norm|block\d+)$",
        description="'norm' (after the final norm) or 'block7' (output of block 7, 0-based)",
    )
    input: Pair = Field((256, 128), description="height and width the teacher is fed with")
    mean: Triple = Field(IMAGENET_MEAN, description="RGB mean, pixels in 0..1")
    std: Triple = Field(IMAGENET_STD, description="RGB standard deviation, pixels in 0..1")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the forward")
    batch_size: int = Field(32, ge=1, description="images in one teacher forward")


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


Teacher = Annotated[TaughtTeacher | TimmTeacher | OnnxTeacher, Field(discriminator="kind")]
