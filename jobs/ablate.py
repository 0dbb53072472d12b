"""`dpal ablate`: a grid of runs in one command, and one table of what came out.

One process prepares what the arms share; then every run is trained and scored in a process of its
own, a few at a time. What is done is skipped, so a grid that was killed goes on where it was.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from cluster.ranks import die_with_parent, worst
from dpal.base.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_RUN_AGAIN,
    DpalError,
    StopRequested,
)
from dpal.base.progress import Progress
from dpal.base.signals import StopSignal
from jobs.grids.grid import Plan, load_plan
from jobs.grids.results import finished, gather, prepared
from jobs.grids.table import console, write_table
from jobs.saved_recipe import credentials

POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
TAIL_BYTES = 4096


class Work(NamedTuple):
    """One process of a grid.

    Attributes:
        name: of the run, or `prepare`.
        words: first arguments of `jobs.grids.worker`.
        log: file that receives all it prints.
    """

    name: str
    words: tuple[str, ...]
    log: Path


class Failure(NamedTuple):
    """A process that did not end well."""

    work: Work
    code: int


def ablate(path: str, words: tuple[str, ...], num_workers: int) -> None:
    """Bring a grid to its end and print its table.

    Raises:
        ConfigError: a grid or a recipe of it that is not valid.
        StopRequested: asked to stop; the runs at work have committed checkpoints.
        DpalError: runs that failed; the others were finished, and the table is of those.
    """
    plan = load_plan(path, words)
    todo = [index for index, run in enumerate(plan.runs) if not finished(plan, run)]
    logs = plan.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    failures: list[Failure] = []
    with StopSignal.listening() as stop:
        crew = Crew(path, words, credentials(plan.shared[0]), stop)
        if not prepared(plan):
            work = Work("prepare", ("prepare",), logs / "prepare.log")
            failures = crew.run([work], 1, "ablate, prepare", 1)
        if not failures and todo:
            names = [plan.runs[index].recipe.name for index in todo]
            pieces = [
                Work(name, ("run", str(index)), logs / f"{name}.log")
                for index, name in zip(todo, names, strict=True)
            ]
            failures = crew.run(pieces, num_workers, "ablate", len(plan.runs))
        stopped = bool(stop)
    rows = gather(plan)
    write_table(plan, rows)
    if stopped:
        raise StopRequested(f"stopped; {_count_finished(plan)} runs are done, run it again")
    print(console(plan, rows))
    print(f"\ntable: {plan.folder / 'table.md'}", flush=True)
    if failures:
        raise _failed(failures)


def dry_run(path: str, words: tuple[str, ...]) -> str:
    """What `ablate` would do: one line for every run, with its command."""
    plan = load_plan(path, words)
    lines = [f"grid {plan.grid.name}: {len(plan.runs)} runs, folder {plan.folder}"]
    for run in plan.runs:
        state = "done" if finished(plan, run) else "to do"
        what = "(scores its start values)" if run.arm.untrained else run.command
        lines.append(f"{run.recipe.name:<42} {state:<6} {what}")
    return "\n".join(lines)


class Crew:
    """Runs pieces of work in processes of one thread each.

    Args:
        grid: the grid file.
        words: overrides of the command line.
        secrets: variables that a worker needs to reach storage.
        stop: raised when this process is asked to stop; the workers are told.
        program: what a worker runs.
    """

    PROGRAM = (sys.executable, "-m", "jobs.grids.worker")

    def __init__(
        self,
        grid: str,
        words: Sequence[str],
        secrets: dict[str, str],
        stop: StopSignal,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._arguments, self._stop, self._program = (grid, *words), stop, program
        self._env = {**os.environ, **secrets, "OMP_NUM_THREADS": "1"}

    def run(self, pieces: Sequence[Work], num_workers: int, what: str, total: int) -> list[Failure]:
        """Do all pieces, a few at a time; what failed is returned, in the order of its end.

        After a stop signal no piece is begun, and those at work are waited for.
        """
        waiting, failures = list(pieces), []
        running: dict[subprocess.Popen[bytes], Work] = {}
        unit = "run" if total > 1 else "stage"
        with (
            self._ended(running),
            Progress(what, total, unit, initial=total - len(waiting)) as progress,
        ):
            told = False
            while running or (waiting and not self._stop):
                while waiting and len(running) < num_workers and not self._stop:
                    work = waiting.pop(0)
                    running[self._start(work)] = work
                if self._stop and not told:
                    told = True
                    for process in running:
                        process.send_signal(signal.SIGTERM)
                for process in [p for p in running if p.poll() is not None]:
                    work, code = running.pop(process), process.returncode
                    if code != EXIT_DONE:
                        failures.append(Failure(work, code))
                    progress.advance(int(code == EXIT_DONE), _note(work, code))
                progress.advance(
                    0, "  ".join(filter(None, (last_line(w.log) for w in running.values())))
                )
                time.sleep(POLL_SECONDS)
        return failures

    def _start(self, work: Work) -> subprocess.Popen[bytes]:
        argv = [*self._program, *work.words, *self._arguments]
        log: IO[bytes]
        with work.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches it once, from here. If this process is killed
            # it dies as well; a second `dpal ablate` must not find it at work.
            return subprocess.Popen(
                argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGKILL),
            )

    @contextmanager
    def _ended(self, running: dict[subprocess.Popen[bytes], Work]) -> Iterator[None]:
        """Leave no process behind, however the block ends."""
        try:
            yield
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
            for process in running:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def last_line(log: Path) -> str:
    """The last line that a worker printed; empty when there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def _note(work: Work, code: int) -> str:
    if code == EXIT_DONE:
        return f"{work.name} is done"
    return f"{work.name} {'stopped' if code == EXIT_RUN_AGAIN else 'failed'}"


def _count_finished(plan: Plan) -> str:
    return f"{sum(finished(plan, run) for run in plan.runs)} of {len(plan.runs)}"


def _failed(failures: Sequence[Failure]) -> DpalError:
    """One error for all failures, with the exit code of the first that is none to try again."""
    for work, code in failures:
        print(
            f"{work.name}: exit code {code}: {last_line(work.log)} (log: {work.log})",
            file=sys.stderr,
        )
    first = failures[0].work
    error = DpalError(
        f"{len(failures)} of the runs failed, the first was {first.name}: see {first.log}"
    )
    error.exit_code = worst([code for _, code in failures]) or EXIT_BUG
    return error
