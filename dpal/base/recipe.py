"""The Recipe: one frozen, strict, hashed description of a run.

Every key is defined here, with its type, range, default and meaning; `dpal.base.config` reads
recipes from files.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SecretStr, model_validator

from dpal.base.combinations import misfit
from dpal.base.methods import Dpal, Method
from dpal.base.section import Duration, Paths, Range, Section
from dpal.base.students import PATCH, Student
from dpal.base.teachers import Teacher


def steps_of(duration: str, num_samples: int, global_batch: int) -> int:
    """Number of optimiser steps in `duration` ("300 steps" or "1.5 epochs")."""
    number, unit = duration.split()
    if unit == "steps":
        return int(float(number))
    return round(float(number) * num_samples / global_batch)


class Storage(Section):
    """How object storage is reached; empty values fall back to the standard AWS variables."""

    endpoint_url: str = Field("", description="S3 endpoint, for stores other than AWS")
    key: SecretStr = Field(SecretStr(""), strict=False, description="access key; never printed")
    secret: SecretStr = Field(SecretStr(""), strict=False, description="secret; never printed")
    retries: int = Field(5, ge=0, description="attempts after the first for a failed request")
    timeout_s: float = Field(30.0, gt=0, description="seconds one request may take")


class Synthetic(Section):
    """Size of the embedded synthetic data set."""

    identities: int = Field(240, ge=4, description="identities drawn for pretraining")
    images_per_identity: int = Field(8, ge=2, description="images drawn for each identity")
    held_out_identities: int = Field(40, ge=4, description="identities drawn for evaluation only")


class Data(Section):
    """Where the images are and how they are sharded."""

    images: Paths = Field(
        min_length=1,
        description="folders or URLs of person images; the single word 'synthetic' draws them",
    )
    backgrounds: Paths = Field(
        (),
        description="folders of images used behind composites; empty: person images serve",
    )
    scenes: Paths = Field(
        (),
        description="folders of images of several persons, for views.composite=scenes; boxes are "
        "read from boxes.csv (file,left,top,right,bottom) or from a COCO instances .json in them",
    )
    shards: str = Field("{run}/shards", description="folder or URL the shards are written to")
    samples_per_shard: int = Field(512, ge=1, description="images in one shard")
    max_shards: int = Field(
        0, ge=0, description="learn from the first so many shards alone, for trials; 0: from all"
    )
    min_side: int = Field(32, ge=1, description="smaller images are rejected, in pixels")
    max_pixels: int = Field(64_000_000, ge=1, description="larger images are rejected undecoded")
    max_reject_fraction: float = Field(
        0.2, ge=0, le=1, description="share of images that may be rejected before sharding stops"
    )
    max_backgrounds: int = Field(256, ge=1, description="backgrounds kept in memory")
    max_scenes: int = Field(
        20_000, ge=1, le=65_536, description="scenes that composites are drawn from"
    )
    synthetic: Synthetic = Synthetic()

    @model_validator(mode="after")
    def _synthetic_has_effect(self) -> "Data":
        if self.synthetic != Synthetic() and self.images != ("synthetic",):
            raise ValueError("data.synthetic has no effect unless data.images is ['synthetic']")
        return self


class Views(Section):
    """Which pixels the models see (method: 1 base view, local crops, 1 composite)."""

    height: int = Field(256, ge=PATCH * 2, description="height of the base view, in pixels")
    width: int = Field(128, ge=PATCH, description="width of the base view, in pixels")
    count: int = Field(2, ge=1, description="pinned base views per image (K)")
    composites: int = Field(
        1, ge=0, description="pinned composites per image (K'); 0 for methods that use none"
    )
    composite: Literal["same", "two", "scenes"] = Field(
        "same",
        description="the two persons of a composite: 'same' image twice (reference), 'two' images "
        "of one shard; or 'scenes': no pasting, crops of real images (data.scenes)",
    )
    scale: Range = Field((0.8, 1.0), description="area of a base view, as a share of the image")
    aspect: Range = Field((0.4, 0.6), description="width / height of a base view or local crop")
    crops: int = Field(2, ge=1, description="local crops per sample")
    crop_scale: Range = Field((0.05, 0.8), description="area of a crop, share of the base view")
    photometric: Literal["free", "pinned", "off"] = Field(
        "free",
        description="colour noise: 'free': fresh, on the student's pixels alone, so targets are of "
        "clean pixels; 'pinned': one for each pinned view, on the teacher's pixels too (reference)",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Views":
        if self.height != 2 * self.width or self.height % 128:
            raise ValueError(
                f"views.height={self.height}, views.width={self.width}: accepted are heights "
                "that are a multiple of 128 and twice the width (256x128, 128x64, ...)"
            )
        for name in ("scale", "crop_scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"views.{name}={[low, high]}: accepted is 0 < low <= high")
        if self.composite != "same" and not self.composites:
            raise ValueError(
                f"views.composite={self.composite} has no effect with views.composites=0; "
                "accepted is to leave it out, or views.composites of 1 and more"
            )
        return self


class Cache(Section):
    """The offline teacher cache."""

    url: str = Field("{run}/targets", description="folder or URL that holds targets-<digest>/")
    codec: Literal["int8", "fp16", "fp32"] = Field("int8", description="how targets are stored")
    calibration_images: int = Field(
        256, ge=8, description="images the header's statistics and shape basis are fitted on"
    )
    ray_address: str = Field(
        "local", description="'local' starts Ray here; else ray://host:port or 'auto'"
    )
    actors: int = Field(1, ge=1, description="teacher actors; one per device")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPUs Ray reserves for an actor")
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs Ray reserves for an actor")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; 0: no endpoint")


class Decoder(Section):
    """D-PaDe, the dynamic pattern decoder; discarded after pretraining."""

    kind: Literal["dynamic", "static", "linear", "shared"] = Field(
        "dynamic",
        description="'dynamic': D-PaDe; 'static': an MLP per pattern with as many parameters; "
        "'linear': a linear layer per pattern; 'shared': one linear layer",
    )
    patterns: Literal[2, 3] = Field(
        3, description="experts: identity, shape and relation, or the first two alone (Swin)"
    )
    query_init: Literal["zeros", "normal"] = Field(
        "zeros", description="pattern queries at start: zeros (reference) or N(0, .02)"
    )
    routing: Literal["soft", "top-1"] = Field(
        "soft", description="all experts mixed (reference), or the likeliest one alone"
    )

    @model_validator(mode="after")
    def _experts_exist(self) -> "Decoder":
        for key in ("query_init", "routing"):
            if self.kind != "dynamic" and getattr(self, key) != Decoder.model_fields[key].default:
                raise ValueError(
                    f"decoder.{key}={getattr(self, key)} has no effect with decoder.kind="
                    f"{self.kind}; accepted is to leave it out, or decoder.kind=dynamic"
                )
        return self


class Loss(Section):
    """Weights of the loss terms (defaults: the reference's final version)."""

    identity: float = Field(1.0, ge=0, description="weight of the global identity term")
    shape: float = Field(1.0, ge=0, description="weight of the local shape term")
    relation: float = Field(1.0, ge=0, description="weight of the multi-person relation term")
    router: float = Field(0.1, ge=0, description="weight of the router term at the start")
    router_late: float = Field(0.01, ge=0, description="weight of the router term afterwards")
    router_switch: Duration = Field("20 epochs", description="when router_late takes over")
    expert: float = Field(0.025, ge=0, description="weight of the expert penalty")
    targets: Literal["raw", "standardised", "phi-s"] = Field(
        "raw",
        description="teacher tokens as they are (reference; of a final norm, so of unit scale), "
        "'standardised' per channel with the cache's statistics (teachers of any other scale), or "
        "'phi-s': turned so that one scale serves every channel and errors keep their ratios",
    )
    affinity: Literal["log_softmax", "log"] = Field(
        "log_softmax",
        description="relation term by log-softmax, or log(softmax) as the reference writes it, "
        "which is infinite where an affinity underflows",
    )
    relation_level: Literal["tokens", "instances"] = Field(
        "tokens",
        description="what the relation term relates: all 'tokens' of a composite (reference), or "
        "the pooled 'instances' in the boxes of a real scene (views.composite=scenes)",
    )
    shape_mask: Literal["fixed", "per-batch", "none", "flipped"] = Field(
        "fixed",
        description="'fixed': basis of the cache header; 'per-batch': principal component of the "
        "batch's own tokens (reference); 'none': every patch counts 1; 'flipped': 1 - fixed",
    )
    teacher_drop: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="with several teachers: share of (image, teacher) losses left out; the "
        "largest of an image never is",
    )


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
    checkpoint_every: int = Field(500, ge=1, description="steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="committed checkpoints that are kept")
    log_every: int = Field(10, ge=1, description="steps between two rows of events.jsonl")
    loader_threads: int = Field(2, ge=1, description="decoding threads of one process")
    prefetch: int = Field(4, ge=1, description="batches prepared ahead")
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
        student, views = self.student, self.views
        if (
            student.height != 2 * student.width
            or views.height % student.height
            or student.height % 128
        ):
            raise ValueError(
                f"student.height={student.height}, student.width={student.width}: accepted are "
                f"multiples of 128 that divide views.height={views.height}, "
                "and a width of half the height"
            )
        if any(t.kind == "taught" for t in self.teachers) and self.data.images != ("synthetic",):
            raise ValueError("teacher.kind=taught needs data.images=['synthetic']")
        drop = self.loss.teacher_drop
        if drop != Loss.model_fields["teacher_drop"].default and len(self.teachers) < 2:
            raise ValueError(f"loss.teacher_drop={drop} has no effect without more_teachers")
        return self

    @model_validator(mode="after")
    def _composites_fit(self) -> "Recipe":
        data, views = self.data, self.views
        real = views.composite == "scenes"
        if real and not data.scenes:
            raise ValueError(
                "views.composite=scenes needs data.scenes, folders of images of several persons"
            )
        for key in ("backgrounds",) if real else ("scenes", "max_scenes"):
            value = getattr(data, key)
            if value != Data.model_fields[key].default:
                raise ValueError(
                    f"data.{key}={value} has no effect with views.composite={views.composite}; "
                    "accepted is to leave it out"
                )
        if self.method.kind == "saip":
            for key, value in (("composite", views.composite), ("photometric", views.photometric)):
                if value not in ("same", "free", "off"):
                    raise ValueError(
                        f"views.{key}={value} has no effect with method.kind=saip, which makes its "
                        "own scenes and pins no view; accepted is to leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _instances_exist(self) -> "Recipe":
        loss, composite = self.loss, self.views.composite
        if loss.relation_level == "tokens":
            return self
        if composite != "scenes":
            raise ValueError(
                "loss.relation_level=instances needs boxes of persons, which views.composite="
                f"{composite} does not have; accepted is views.composite=scenes"
            )
        if not loss.relation:
            raise ValueError(
                "loss.relation_level=instances has no effect with loss.relation=0; accepted is "
                "to leave it out, or a positive weight"
            )
        if loss.affinity != "log_softmax":
            raise ValueError(
                f"loss.affinity={loss.affinity} is the reference's relation of tokens; accepted "
                "with loss.relation_level=instances is log_softmax"
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "Recipe":
        kind, loss = self.method.kind, self.loss
        if self.teacher is None and (kind != "saip" or self.more_teachers):
            raise ValueError(f"method.kind={kind} needs a teacher; accepted without one is saip")
        if self.train.ema and self.train.zero_stage == 3:
            raise ValueError(
                f"train.ema={self.train.ema} needs whole parameters on every process; accepted "
                "are train.zero_stage=0, 1 and 2, or train.ema=0"
            )
        if kind == "dpal":
            if loss.relation and not self.views.composites:
                raise ValueError(
                    f"loss.relation={loss.relation} needs composites; accepted are "
                    "views.composites of 1 and more, or loss.relation=0"
                )
            if loss.relation and self.decoder.patterns == 2:
                raise ValueError(
                    f"decoder.patterns=2 has no expert for loss.relation={loss.relation}; "
                    "accepted are decoder.patterns=3, or loss.relation=0"
                )
            for key in ("router", "router_late", "router_switch", "expert"):
                value = getattr(loss, key)
                if self.decoder.kind != "dynamic" and value != Loss.model_fields[key].default:
                    raise ValueError(
                        f"loss.{key}={value} has no effect with decoder.kind={self.decoder.kind}; "
                        "accepted is to leave it out, or decoder.kind=dynamic"
                    )
            if not loss.identity + loss.shape + loss.relation:
                raise ValueError(
                    "loss.identity, loss.shape and loss.relation are all 0; accepted is a "
                    "positive weight for one of them at least"
                )
            return self
        for name in ("decoder", "loss"):
            section, free = getattr(self, name), {"targets", "teacher_drop"}
            for key in type(section).model_fields.keys() - free:
                value = getattr(section, key)
                if value != type(section).model_fields[key].default:
                    raise ValueError(
                        f"{name}.{key}={value} has no effect with method.kind={kind}; accepted is "
                        "to leave it out, or method.kind=dpal"
                    )
        return self

    @model_validator(mode="after")
    def _combination_makes_sense(self) -> "Recipe":
        if reason := misfit(self):
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
