"""The whole pipeline, twice: everything is made once, and then nothing is done."""

import hashlib
import json
import subprocess
from pathlib import Path

from tiny_demo import TINY_DEMO, dpal

STAGES = ("shard", "teach", "cache", "train", "evaluate", "export", "report")

First = tuple[Path, subprocess.CompletedProcess[str]]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_stage_runs_and_the_report_is_there(first_demo: First) -> None:
    folder, done = first_demo
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STAGES:
        assert f"{stage}: done" in done.stdout
    assert (folder / "report.html").stat().st_size > 10_000
    rows = json.loads((folder / "evaluation.json").read_text())
    models = {(row["task"], row["model"]) for row in rows}
    expected = {(task, model) for task in ("reid", "parsing")
                for model in ("student", "teacher", "untrained")}  # fmt: skip
    assert models >= expected


def test_the_second_run_does_nothing(first_demo: First) -> None:
    folder, done = first_demo
    assert done.returncode == 0, done.stderr[-3000:]
    before = snapshot(folder)
    again = dpal(folder.parent.parent, "demo", *TINY_DEMO)
    assert again.returncode == 0, again.stderr[-3000:]
    for stage in STAGES:
        assert f"{stage}: skipped" in again.stdout
    assert snapshot(folder) == before
