"""A real two-node Slurm runs, requeues, shows and stops our jobs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.slurm import SlurmLauncher
from cluster.spec import JobSpec, job_spec
from dpal.base.config import load_recipe
from jobs import submit as verbs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "jobs" / "recipes" / "demo.yaml"

# A small program that keeps the contract of training: every rank meets the others at
# MASTER_ADDR:MASTER_PORT, counts steps, commits on a stop signal, goes on where it stopped.
PROGRAM = """\
import json, os, pathlib, signal, socket, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
meet = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stop.append(number))
if rank == 0:
    door = socket.create_server(meet)
    for _ in range(world - 1):
        door.accept()[0].sendall(b"welcome")
else:
    for attempt in range(200):
        try:
            guest = socket.create_connection(meet)
            break
        except OSError:
            time.sleep(.1)
    assert guest.recv(7) == b"welcome"
state = pathlib.Path(f"state-{rank}.json")
step = json.loads(state.read_text())["step"] if state.exists() else 0
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE SLURMD_NODENAME OMP_NUM_THREADS".split()
row = {"start": step, **{name: os.environ[name] for name in names}}
with open(f"rows-{rank}.jsonl", "a") as rows:
    rows.write(json.dumps(row) + "\\n")
print(f"rank {rank} starts at step {step}", flush=True)
while step < int(sys.argv[1]):
    step += 1
    time.sleep(.1)
    if stop:
        state.write_text(json.dumps({"step": step}))
        print(f"rank {rank} stops at step {step} on signal {stop[0]}", flush=True)
        sys.exit(75)
if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2]))
pathlib.Path(f"done-{rank}").write_text(str(step))
"""


@pytest.fixture(autouse=True)
def _workdir(on_slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)


def submit(arguments: str, **job: object) -> str:
    """Submit the real batch script with the test's program in the place of `dpal`."""
    settings = {"nodes": 2, "cpus_per_node": 1, "memory_gb": 1, **job}
    overrides = tuple(f"job.{key}={value}" for key, value in settings.items())
    spec: JobSpec = job_spec(load_recipe(RECIPE, overrides), RECIPE, (), "train")
    ours, theirs = f" dpal train {RECIPE} ", f" {sys.executable} program.py {arguments} "
    script = SlurmLauncher().render(spec)
    assert script.count(ours) == 1
    return SlurmLauncher().submit(spec, script.replace(ours, theirs))


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def final(job: str) -> verbs.JobStatus:
    wait_for(lambda: verbs.status(job).state not in ("pending", "running"))
    return verbs.status(job)


def rows(folder: Path, rank: int) -> list[dict[str, str]]:
    path = folder / f"rows-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_nodes_run_one_rank_each_and_meet(tmp_path: Path) -> None:
    job = submit("1")
    assert final(job) == ("succeeded", "COMPLETED, 0 restarts, exit code 0")
    first, second = rows(tmp_path, 0)[0], rows(tmp_path, 1)[0]
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert {first["SLURMD_NODENAME"], second["SLURMD_NODENAME"]} == {"node1", "node2"}
    assert {row["WORLD_SIZE"] for row in (first, second)} == {"2"}
    assert {row["LOCAL_RANK"] for row in (first, second)} == {"0"}
    assert {row["OMP_NUM_THREADS"] for row in (first, second)} == {"1"}
    log = "\n".join(verbs.logs(job))
    assert "rank 0 starts at step 0" in log
    assert "rank 1 starts at step 0" in log


def test_a_job_asked_to_stop_requeues_itself_and_goes_on(tmp_path: Path) -> None:
    job = submit("60")
    wait_for(lambda: bool(rows(tmp_path, 0)) and bool(rows(tmp_path, 1)))
    # What --signal=B:USR1@… does before the time limit: USR1 to the batch shell alone.
    number = job.partition(":")[2]
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)
    assert final(job) == ("succeeded", "COMPLETED, 1 restarts, exit code 0")
    for rank in range(2):
        starts = [row["start"] for row in rows(tmp_path, rank)]
        assert len(starts) == 2
        assert starts[0] == 0 < starts[1] < 60
        assert (tmp_path / f"done-{rank}").read_text() == "60"
    log = "\n".join(verbs.logs(job))
    assert log.count("stops at step") == 2
    assert "exit code 75 after 0 restarts" in log


def test_a_failed_job_is_tried_again_as_often_as_allowed(tmp_path: Path) -> None:
    job = submit("1 9", max_restarts=1)
    assert final(job) == ("failed", "FAILED, 1 restarts, exit code 9")
    assert len(rows(tmp_path, 0)) == 2


def test_a_matter_for_a_person_is_not_tried_again(tmp_path: Path) -> None:
    job = submit("1 2")
    assert final(job) == ("failed", "FAILED, 0 restarts, exit code 2")
    assert len(rows(tmp_path, 0)) == 1


def test_cancel_commits_and_stays_cancelled(tmp_path: Path) -> None:
    job = submit("600")
    wait_for(lambda: bool(rows(tmp_path, 0)) and bool(rows(tmp_path, 1)))
    assert verbs.status(job).state == "running"
    assert submit("600") == job  # one living job of a name
    verbs.cancel(job)
    assert final(job).state == "stopped"
    assert (tmp_path / "state-0.json").exists()
    time.sleep(3)
    assert verbs.status(job).state == "stopped"
    assert len(rows(tmp_path, 0)) == 1
    verbs.cancel(job)  # a second time is no error


def test_a_job_of_the_past_is_unknown() -> None:
    assert verbs.status("slurm:999999").state == "unknown"


def test_the_time_limit_asks_for_a_stop_in_time(tmp_path: Path) -> None:
    """No signal of ours: Slurm itself sends USR1 before the limit of one minute."""
    job = submit("3000", time_minutes=1)
    wait_for(lambda: len(rows(tmp_path, 0)) > 1 and len(rows(tmp_path, 1)) > 1, 150)
    assert verbs.status(job).state == "running"
    log = "\n".join(verbs.logs(job))
    assert f"on signal {int(signal.SIGUSR1)}" in log
    assert "exit code 75 after 0 restarts" in log
    assert rows(tmp_path, 0)[1]["start"] > 0
    verbs.cancel(job)
