"""The Recipe: one frozen, strict, hashed description of a run.

Every key is defined here or in the files of the larger sections beside it, with its type, range,
default and meaning; `dpal.base.config` reads recipes from files.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from dpal.base.agreement import disagreement
from dpal.base.codec import CodecWord
from dpal.base.combinations import misfit
from dpal.base.inputs import Data, Storage, Views
from dpal.base.losses import Decoder, Loss
from dpal.base.methods import Dpal, Method
from dpal.base.section import Duration, Range, Section
from dpal.base.students import Student
from dpal.base.teachers import Teacher


def steps_of(duration: str, num_samples: int, global_batch: int) -> int:
    """Number of optimiser steps in `duration` ("300 steps" or "1.5 epochs")."""
    number, unit = duration.split()
    if unit == "steps":
        return int(float(number))
    return round(float(number) * num_samples / global_batch)


class Cache(Section):
    """The offline teacher cache."""

    url: str = Field("{run}/targets", description="folder or URL that holds targets-<digest>/")
    codec: CodecWord = Field(
        "int8",
        description="how targets are stored: int8, int4, fp16 or fp32; before each but fp32, "
        "pca<r>- keeps r components of a patch token and phis- turns it, as in pca128-int4",
    )
    calibration_images: int = Field(
        256, ge=8, description="images the header's statistics and shape basis are fitted on"
    )
    ray_address: str = Field(
        "local", description="'local' starts Ray here; else ray://host:port or 'auto'"
    )
    actors: int = Field(1, ge=1, description="teacher actors; one per device")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPUs Ray reserves for an actor")
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs Ray reserves for an actor")
    shard_timeout_s: float = Field(
        0.0,
        ge=0,
        description="an actor that has one shard for longer is killed, and the shard done again; "
        "0: never",
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0: no endpoint")


class Train(Section):
    """Optimisation and the engine."""

    duration: Duration = Field("200 epochs", description="length of the run")
    warmup: Duration = Field("10 epochs", description="linear warm-up from 0")
    global_batch: int = Field(2048, ge=1, description="samples in one optimiser step")
    micro_batch: int = Field(256, ge=1, description="samples in one forward of one process")
    lr: float = Field(2e-3, gt=0, description="peak learning rate, at this global batch")
    betas: Range = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay of matrices (not biases)")
    start_lr: float = Field(0.0, ge=0, description="learning rate that the warm-up starts from")
    end_lr: float = Field(0.0, ge=0, description="learning rate that the cosine ends at")
    ema: float = Field(
        0.0, ge=0, lt=1, description="momentum of a moving average of the student; 0: none"
    )
    seed: int = Field(
        0,
        ge=0,
        description="added to the recipe's seed for start values, order, crops and noise, but not "
        "for pinned views: repetitions of a run share one cache",
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="precision of the forward")
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    processes: int = Field(1, ge=1, description="training processes on this node")
    targets: Literal["cached", "online"] = Field(
        "cached", description="where teacher targets come from"
    )
    parity_samples: int = Field(
        8,
        ge=0,
        description="samples whose cached targets are compared with the teacher itself before "
        "training starts; 0: none",
    )
    partial: bool = Field(
        False,
        description="train while the cache is being built: on the shards that are finished at the "
        "run's first start, which stay its shards",
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="committed checkpoints that are kept")
    log_every: int = Field(10, ge=1, description="steps between two rows of events.jsonl")
    loader_threads: int = Field(
        2, ge=0, description="decoding threads of one process; 0: decode between two steps"
    )
    prefetch: int = Field(4, ge=1, description="batches prepared ahead")
    render: Literal["loader", "device"] = Field(
        "loader",
        description="who resizes images to views: the loader's threads, or the training device, "
        "which gives the same pixels; crops of scenes (views.composite=scenes) are always the "
        "loader's",
    )
    lanes: int = Field(
        64,
        ge=1,
        description="lanes of the sample order: the greatest common divisor of this and "
        "global_batch, which the number of processes must divide; more lanes mix more shards",
    )
    window: int = Field(4, ge=1, description="shards of a lane whose samples are mixed at a time")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0: no endpoint")

    @model_validator(mode="after")
    def _batches_divide(self) -> "Train":
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not a multiple of "
                f"train.micro_batch={self.micro_batch}"
            )
        return self


class Evaluation(Section):
    """One frozen-feature evaluation."""

    task: Literal["reid", "parsing"] = Field(description="which downstream task")
    data: str = Field(description="folder with labels; 'synthetic' draws held-out persons")


class Job(Section):
    """What a scheduler is asked for by `dpal submit`."""

    nodes: int = Field(1, ge=1, description="machines")
    cpus_per_node: int = Field(2, ge=1, description="CPU cores on each machine")
    gpus_per_node: int = Field(0, ge=0, description="GPUs on each machine")
    memory_gb: int = Field(8, ge=1, description="memory on each machine, in GB")
    time_minutes: int = Field(60, ge=1, description="wall-clock limit, in minutes")
    max_restarts: int = Field(10, ge=0, description="how often a failed job is run again")
    partition: str = Field("", description="Slurm partition; empty: the cluster's default")
    namespace: str = Field("default", description="Kubernetes namespace")
    image: str = Field("dpal:latest", description="container image (Kubernetes)")
    volume: str = Field(
        "dpal-runs", description="PersistentVolumeClaim that holds run folders (Kubernetes)"
    )
    setup: str = Field("", description="shell line run on the node first (Slurm)")


class Recipe(Section):
    """One run, complete."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$", description="run name")
    seed: int = Field(0, ge=0, description="the only source of randomness")
    output: str = Field("runs", description="local folder that holds the run folder")
    storage: Storage = Storage()
    data: Data
    views: Views = Views()
    method: Method = Dpal()
    teacher: Teacher | None = None
    more_teachers: Annotated[tuple[Teacher, ...], Field(strict=False)] = ()
    cache: Cache = Cache()
    student: Student = Student()
    decoder: Decoder = Decoder()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Annotated[tuple[Evaluation, ...], Field(strict=False)] = ()
    job: Job = Job()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        if reason := disagreement(self) or misfit(self):
            raise ValueError(reason)
        return self

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Every frozen teacher, in order; empty for a method that learns without one."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    @property
    def aligned_teachers(self) -> tuple[Teacher, ...]:
        """The teachers whose targets the method learns from; SAIP learns from none."""
        return () if self.method.kind == "saip" else self.teachers

    def with_teacher(self, teacher: Teacher) -> "Recipe":
        """The same recipe with one teacher alone: whose cache it describes."""
        return self.model_copy(update={"teacher": teacher, "more_teachers": ()})

    @property
    def run_dir(self) -> Path:
        """Local folder of this run."""
        return Path(self.output) / self.name

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that loads again; credentials are left out."""
        plain = self.model_dump(mode="json", exclude={"storage": {"key", "secret"}})
        return yaml.safe_dump(plain, sort_keys=False)

    def science(self) -> dict[str, Any]:
        """Every value that decides what is learned, by dotted key.

        Left out is what may change between two starts of one run: where things are stored, how
        many processes share the work, and how often they report.
        """
        elastic = {"zero_stage", "processes", "checkpoint_every"}
        elastic |= {"keep_checkpoints", "log_every", "loader_threads", "prefetch", "metrics_port"}
        elastic |= {"render"}  # the pixels are the same
        elastic |= {"parity_samples", "partial"}  # which shards those are is told by itself
        if self.loss.shape_mask != "per-batch" and self.student.family != "timm":
            elastic.add("micro_batch")  # else a mask, or a batch norm, sees one micro-batch
        learned = {"seed", "views", "method", "teacher", "more_teachers", "student"}
        learned |= {"decoder", "loss", "train"}
        plain = self.model_dump(
            mode="json",
            include=learned,
            exclude={
                "train": elastic,
                "teacher": {"batch_size"},
                "more_teachers": {"__all__": {"batch_size"}},
            },
        )
        plain["cache"] = {"codec": self.cache.codec}
        return dict(_flatten(plain))

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of everything that can change results."""
        plain = self.model_dump(mode="json", exclude={"storage", "job", "output"})
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flatten(inner, f"{prefix}.{name}" if prefix else name)
