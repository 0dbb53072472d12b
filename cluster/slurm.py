"""Slurm: one batch script, one srun task for each rank, requeued by itself on exit code 75."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from cluster.launcher import JobStatus, State, call, fill_template, shell_environment
from cluster.spec import MENDABLE, JobSpec
from dpal.base.errors import EXIT_DONE, EXIT_RUN_AGAIN, ConfigError, DataError, StorageError

WAIT_SECONDS = 300
# What a rank is told; every stage but train is one process and must not look like a rank.
RANK_TASK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
    'LOCAL_WORLD_SIZE={processes}; exec "$@"'
)
PLAIN_TASK = 'exec "$@"'
STATES: dict[str, State] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending",
    "SPECIAL_EXIT": "pending",
    "SUSPENDED": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "COMPLETED": "succeeded",
    "CANCELLED": "stopped",
    "PREEMPTED": "stopped",
}


class SlurmLauncher:
    """Submits with `sbatch`, asks with `scontrol` and `squeue`, stops with `scancel`."""

    def render(self, spec: JobSpec) -> str:
        """The batch script. Raises ConfigError."""
        if spec.nodes > 1 and spec.stage == "cache":
            raise ConfigError(
                f"job.nodes={spec.nodes} for stage cache on slurm; accepted is 1 (one node and "
                "as many cache.actors as it has room for)"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.,-]*", spec.partition):
            raise ConfigError(f"job.partition={spec.partition!r}: accepted are names of partitions")
        for path in (spec.workdir, spec.folder):
            if not re.fullmatch(r"[^\s%\\'\"]+", path):
                raise ConfigError(
                    f"folder {path!r}: accepted on slurm are paths without blanks, quotes and %"
                )
        optional = [f"#SBATCH --gpus-per-node={spec.gpus}"] if spec.gpus else []
        optional += [f"#SBATCH --partition={spec.partition}"] if spec.partition else []
        task = PLAIN_TASK
        if spec.stage == "train":
            task = RANK_TASK.format(processes=spec.processes_per_node)
        return fill_template(
            "slurm.sh",
            {
                "name": spec.name,
                "nodes": str(spec.nodes),
                "processes": str(spec.processes_per_node),
                "cpus_per_task": str(max(spec.cpus // spec.processes_per_node, 1)),
                "memory_gb": str(spec.memory_gb),
                "time_minutes": str(spec.time_minutes),
                "workdir": spec.workdir,
                "folder": spec.folder,
                "stop_notice_s": str(spec.stop_notice_s),
                "optional": "\n".join(optional),
                "environment": shell_environment(spec),
                "setup": spec.setup,
                "wait_s": str(WAIT_SECONDS),
                "task": shlex.quote(task),
                "command": shlex.join(spec.command),
                "final": "|".join(str(code) for code in (EXIT_DONE, *MENDABLE)),
                "max_restarts": str(spec.max_restarts),
            },
        )

    def submit(self, spec: JobSpec, rendered: str) -> str:
        """Submit with sbatch unless a job of this name and user is pending or running."""
        alive = call(
            ["squeue", "--me", "--noheader", f"--name={spec.name}", "--format=%i"],
            why=f"submit {spec.name}",
        ).split()
        if alive:
            return f"slurm:{alive[0]}"
        try:
            Path(spec.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {spec.folder!r}: {error.strerror}") from None
        printed = call(["sbatch", "--parsable"], stdin=rendered, why=f"submit {spec.name}")
        return f"slurm:{printed.strip().partition(';')[0]}"

    def status(self, job: str) -> JobStatus:
        """Asked of the controller, which forgets a job some minutes after its end."""
        fields = self._show(job)
        if not fields:
            return JobStatus("unknown", "no longer known to the controller")
        word = fields.get("JobState", "")
        detail = f"{word}, {fields.get('Restarts', '0')} restarts"
        code = fields.get("ExitCode", "0:0").partition(":")[0]
        if word == "FAILED" and code == str(EXIT_RUN_AGAIN):
            return JobStatus("stopped", f"{detail}, exit code {code}: submit it again to go on")
        if word == "PENDING":
            detail += f", waits for {fields.get('Reason', 'None')}"
        elif word not in ("RUNNING", "COMPLETING"):
            detail += f", exit code {code}"
        return JobStatus(STATES.get(word, "failed"), detail)

    def logs(self, job: str) -> Iterator[str]:
        """The job's output file, which lies on the file system shared with the nodes."""
        fields = self._show(job)
        if "StdOut" not in fields:
            raise DataError(
                f"job {job!r} is no longer known to Slurm's controller; its log is "
                f"slurm-{self._number(job)}.log in jobs/ of the run folder"
            )
        path = Path(fields["StdOut"])
        if path.is_file():
            with path.open(errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines)

    def cancel(self, job: str) -> None:
        """Stop for good: the script's own requeue is switched off first."""
        number = self._number(job)
        if self.status(job).state not in ("pending", "running"):
            return
        why = f"cancel {job}"
        call(["scontrol", "update", f"JobId={number}", "Requeue=0"], why=why)
        call(["scancel", number], why=why)

    def _show(self, job: str) -> dict[str, str]:
        number = self._number(job)
        try:
            line = call(["scontrol", "--oneliner", "show", "job", number], why=f"find {job}")
        except StorageError as error:
            if "Invalid job id" in str(error):
                return {}
            raise
        return dict(re.findall(r"(\w+)=(\S+)", line))

    @staticmethod
    def _number(job: str) -> str:
        number = job.removeprefix("slurm:")
        if not number.isdigit():
            raise ConfigError(f"job {job!r}: accepted is slurm:<number>")
        return number
