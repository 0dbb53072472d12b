"""The local scheduler: detached, one job of a name, run again on 75, cancelled by its group."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local import LocalLauncher
from cluster.spec import JobSpec, job_spec
from dpal.base.config import load_recipe
from dpal.base.errors import ConfigError
from jobs import submit as verbs

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "demo.yaml"


@pytest.fixture(autouse=True)
def _workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(RECIPE.parents[2]))


def spec_of(**job: object) -> JobSpec:
    overrides = tuple(f"job.{key}={value}" for key, value in job.items())
    return job_spec(load_recipe(RECIPE, overrides), RECIPE, (), "train")


def start(script: str, **job: object) -> str:
    return LocalLauncher().submit(spec_of(**job), f"#!/bin/sh\n{script}\n")


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def final(job: str) -> verbs.JobStatus:
    wait_for(lambda: verbs.status(job).state != "running")
    return verbs.status(job)


def test_a_job_ends_with_its_log_and_state() -> None:
    job = start("echo one; echo two >&2")
    assert job == "local:demo-train"
    assert final(job) == ("succeeded", "exit code 0, 0 restarts")
    assert list(verbs.logs(job))[:2] == ["one", "two"]


def test_the_rendered_script_runs_the_real_command() -> None:
    job = verbs.submit(RECIPE, ("train.lr=1e-3",), stage="cache", on="local", dry_run=True)
    assert job == ""
    spec = spec_of(setup="mark=of-the-setup")
    script = LocalLauncher().render(spec).replace("exec dpal", 'echo "$mark" "$OMP_NUM_THREADS"')
    job = LocalLauncher().submit(spec, script)
    assert final(job).state == "succeeded"
    assert next(verbs.logs(job)) == f"of-the-setup 2 train {RECIPE}"


def test_a_job_that_asks_to_be_run_again_is(tmp_path: Path) -> None:
    job = start(f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) = 3 || exit 75")
    assert final(job) == ("succeeded", "exit code 0, 2 restarts")


def test_restarts_are_bounded_and_the_job_stays_resumable(tmp_path: Path) -> None:
    job = start(f"echo x >> {tmp_path}/tries; exit 75", max_restarts=1)
    assert final(job) == ("stopped", "exit code 75, 1 restarts")
    assert (tmp_path / "tries").read_text() == "x\nx\n"


@pytest.mark.parametrize("code", [2, 3, 4])
def test_an_error_for_a_person_is_not_tried_again(code: int) -> None:
    assert final(start(f"exit {code}")) == ("failed", f"exit code {code}, 0 restarts")


def test_submitting_twice_answers_with_the_living_job(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/tries; sleep 30"
    first = start(script)
    wait_for((tmp_path / "tries").exists)
    assert start(script) == first
    verbs.cancel(first)
    assert final(first).state == "stopped"
    assert (tmp_path / "tries").read_text() == "x\n"


def test_cancel_lets_the_program_commit_and_does_not_run_it_again(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    pathlib.Path('committed').write_text('yes')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('up').write_text('')\ntime.sleep(30)\n"
    )
    (tmp_path / "program.py").write_text(code)
    job = start(f"cd {tmp_path}; exec {sys.executable} program.py")
    wait_for((tmp_path / "up").exists)
    verbs.cancel(job)
    assert final(job) == ("stopped", "exit code 75, 0 restarts")
    assert (tmp_path / "committed").exists()


def test_a_killed_supervisor_is_seen_and_takes_the_job_with_it(tmp_path: Path) -> None:
    job = start(f"echo $$ > {tmp_path}/pid; exec sleep 30")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    os.kill(int(verbs.status(job).detail.split()[-1]), 9)
    assert final(job).state == "failed"
    pid = (tmp_path / "pid").read_text().strip()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(gone)


def test_a_job_elsewhere_is_named_by_its_folder(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, (f"output={tmp_path}/a/b/c",))
    job = LocalLauncher().submit(job_spec(recipe, RECIPE, (), "run"), "#!/bin/sh\necho hi\n")
    assert job == f"local:{tmp_path}/a/b/c/demo/jobs/demo-run"
    assert final(job).state == "succeeded"


@pytest.mark.parametrize("job", ["local:nothing", "nothing", "moon:1", "slurm:x", "kubernetes:a/b"])
def test_an_unknown_job_is_refused_with_what_is_accepted(job: str) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        verbs.status(job)


def test_more_than_one_node_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"job\.nodes=2"):
        LocalLauncher().render(spec_of(nodes=2))


def test_the_real_program_runs_and_its_error_is_in_the_log(capsys) -> None:
    job = verbs.submit(RECIPE, stage="train", on="local")
    assert f"dpal status {job}" in capsys.readouterr().out
    wait_for(lambda: verbs.status(job).state != "running", 150)
    log = "\n".join(verbs.logs(job))
    assert verbs.status(job) == ("failed", "exit code 3, 0 restarts"), log
    assert "dpal train: " in log  # there are no shards: data, a matter for a person
    assert "manifest.json" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("scheduler", ["local", "slurm", "kubernetes"])
def test_a_dry_run_needs_no_torch_and_starts_nothing(scheduler: str, tmp_path: Path) -> None:
    code = (
        "import sys; from jobs.submit import submit\n"
        f"submit({str(RECIPE)!r}, stage='train', on={scheduler!r}, dry_run=True)\n"
        "assert not {'torch', 'ray', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert list(tmp_path.iterdir()) == []
