"""The JobSpec: what a scheduler runs, where, with how much, and how often it is tried again."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dpal.base.errors import ConfigError
from dpal.base.recipe import Recipe

Stage = Literal["cache", "train", "run"]
STAGES: tuple[Stage, ...] = ("cache", "train", "run")
MENDABLE = (2, 3, 4)  # exit codes that running again cannot help: a person has to act
SECRETS = ("storage.key", "storage.secret")
STOP_NOTICE_SECONDS = 120
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # DNS-1123 label (RFC 1123)


@dataclass(frozen=True)
class JobSpec:
    """One job, independent of the scheduler.

    Attributes:
        name: `<recipe name>-<stage>`; unique on a scheduler while the job lives.
        command: argv of one process, beginning with `dpal`.
        processes_per_node: ranks on each node; 1 for every stage but train.
        cpus: cores of each node.
        gpus: devices of each node.
        env: variables set for the command.
        workdir: absolute folder that relative paths of the recipe start from.
        folder: where the scheduler's log and the job's own records go.
        recipe: the recipe as YAML, overrides applied, without secrets.
        metrics_port: Prometheus port of rank 0; 0: none.
    """

    name: str
    stage: Stage
    command: tuple[str, ...]
    nodes: int
    processes_per_node: int
    cpus: int
    gpus: int
    memory_gb: int
    time_minutes: int
    env: tuple[tuple[str, str], ...]
    workdir: str
    folder: str
    image: str
    namespace: str
    volume: str
    partition: str
    setup: str
    max_restarts: int
    recipe: str
    metrics_port: int

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.processes_per_node

    @property
    def stop_notice_s(self) -> int:
        """Seconds before the time limit at which the job is asked to stop."""
        return min(STOP_NOTICE_SECONDS, self.time_minutes * 60 // 4)


def job_spec(
    recipe: Recipe, recipe_path: str | Path, overrides: tuple[str, ...], stage: Stage
) -> JobSpec:
    """The job that runs `dpal <stage> <recipe> <overrides>`.

    Raises:
        ConfigError: a secret among the overrides, or sizes of the section `job` that do not fit.
    """
    job = recipe.job
    for override in overrides:
        if override.startswith(SECRETS):
            raise ConfigError(
                f"override {override.partition('=')[0]!r} would be written into the job's script; "
                "accepted are the AWS variables of the environment"
            )
    if stage == "run" and job.nodes > 1:
        raise ConfigError(
            f"job.nodes={job.nodes} has no effect on stage run; accepted is 1, or submit "
            "the stages cache and train one after the other"
        )
    processes = recipe.train.processes if stage == "train" else 1
    if stage == "train" and job.gpus_per_node not in (0, processes):
        raise ConfigError(
            f"job.gpus_per_node={job.gpus_per_node} with train.processes={processes}; "
            "accepted is one process for each GPU, or 0 GPUs"
        )
    if stage != "train":
        _check_actors(recipe)
    threads = max(job.cpus_per_node // processes, 1)
    return JobSpec(
        name=f"{recipe.name}-{stage}",
        stage=stage,
        command=("dpal", stage, str(Path(recipe_path).resolve()), *overrides),
        nodes=job.nodes,
        processes_per_node=processes,
        cpus=job.cpus_per_node,
        gpus=job.gpus_per_node,
        memory_gb=job.memory_gb,
        time_minutes=job.time_minutes,
        env=(("OMP_NUM_THREADS", str(threads)), ("PYTHONUNBUFFERED", "1")),
        workdir=str(Path.cwd()),
        folder=str((recipe.run_dir / "jobs" / f"{recipe.name}-{stage}").resolve()),
        image=job.image,
        namespace=job.namespace,
        volume=job.volume,
        partition=job.partition,
        setup=job.setup,
        max_restarts=job.max_restarts,
        recipe=_recipe_text(recipe),
        metrics_port=recipe.train.metrics_port,
    )


def require_name(key: str, value: str, max_length: int = 63) -> None:
    """Raise ConfigError unless `value` is a lower-case DNS label of at most `max_length`."""
    if len(value) > max_length or not NAME.fullmatch(value):
        raise ConfigError(
            f"{key}={value!r}: accepted are at most {max_length} lower-case letters, digits and "
            "dashes, with a letter or digit at both ends"
        )


def _check_actors(recipe: Recipe) -> None:
    """Ray waits for ever for an actor that fits nowhere; say so before anything is queued."""
    cache, job = recipe.cache, recipe.job
    if cache.ray_address.startswith("ray://"):
        return  # another cluster's capacity
    for what, per_actor, per_node in (
        ("cpus", cache.cpus_per_actor, job.cpus_per_node),
        ("gpus", cache.gpus_per_actor, job.gpus_per_node),
    ):
        room = job.nodes * math.floor(per_node / per_actor) if per_actor else cache.actors
        if cache.actors > room:
            raise ConfigError(
                f"cache.actors={cache.actors} with cache.{what}_per_actor={per_actor:g} on "
                f"job.nodes={job.nodes} with job.{what}_per_node={per_node}: accepted are at most "
                f"{room} actors"
            )


def _recipe_text(recipe: Recipe) -> str:
    # Only what was set: a default written out may be refused as a setting without effect.
    values = recipe.model_dump(
        mode="json", exclude_unset=True, exclude={"storage": {"key", "secret"}}
    )
    return yaml.safe_dump(values, sort_keys=False)
