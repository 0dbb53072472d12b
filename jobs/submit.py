"""`dpal submit`, `status`, `logs` and `cancel`: the same words on every scheduler."""

from collections.abc import Iterator
from pathlib import Path

from cluster.launcher import JobStatus, launcher, launcher_of
from cluster.spec import STAGES, Stage, job_spec
from dpal.base.config import load_recipe
from dpal.base.errors import ConfigError


def submit(
    recipe_path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    stage: str,
    on: str,
    dry_run: bool = False,
) -> str:
    """Render a job, show it, and submit it unless `dry_run`.

    A job of the same name that is still pending or running on that scheduler is not submitted
    a second time: its id is the answer.

    Returns:
        The job id, or "" after a dry run.

    Raises:
        ConfigError: the recipe, stage or scheduler does not fit.
        StorageError: the scheduler is absent or refuses.
    """
    scheduler = launcher(on)
    spec = job_spec(load_recipe(recipe_path, overrides), recipe_path, overrides, _stage(stage))
    rendered = scheduler.render(spec)
    print(rendered, flush=True)
    if dry_run:
        return ""
    job = scheduler.submit(spec, rendered)
    print(f"submitted {job}\n  dpal status {job}\n  dpal logs {job}\n  dpal cancel {job}")
    return job


def status(job: str) -> JobStatus:
    """Where a job stands. Raises ConfigError, StorageError."""
    return launcher_of(job).status(job)


def logs(job: str) -> Iterator[str]:
    """The lines that a job has printed so far. Raises ConfigError, DataError, StorageError."""
    return launcher_of(job).logs(job)


def cancel(job: str) -> None:
    """Stop a job for good. Raises ConfigError, StorageError."""
    launcher_of(job).cancel(job)


def _stage(stage: str) -> Stage:
    for known in STAGES:
        if stage == known:
            return known
    raise ConfigError(f"stage {stage!r}: accepted are {', '.join(STAGES)}")
