"""`dpal ablate`: strict grids, one table, failures told, and a stop that loses nothing."""

import errno
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dpal.base.config import load_recipe
from dpal.base.errors import EXIT_DATA, EXIT_DONE, EXIT_STORAGE, ConfigError, DpalError
from dpal.base.recipe import Recipe
from dpal.base.signals import StopSignal
from dpal.model.student import SHAPES, Shape
from jobs import ablate, build_shards, cache_features, teach
from jobs.ablate import Crew, Work
from jobs.grids import worker as grid_worker
from jobs.grids.grid import Plan, load_plan
from jobs.grids.results import Measure, finished, gather, prepared, training_cost
from jobs.pictures import pictures
from jobs.stage import StageResult

from tiny import tiny_values

ARMS = [
    {"name": "untrained", "untrained": True},
    {"name": "mse", "label": "feature MSE", "overrides": ["method=mse"]},
    {"name": "linear", "overrides": ["decoder.kind=linear"], "diagnose": True},
]


def write_grid(folder: Path, values: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A grid and its base recipe, whose images and weights do not exist unless `values` are."""
    values = values or {
        "name": "base",
        "output": str(folder / "runs"),
        "data": {"images": ["nowhere"]},
        "teacher": {"kind": "timm", "name": "vit_tiny_patch16_224"},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    grid = {"name": "g", "base": "base.yaml", "repetitions": 2, "arms": ARMS, **changes}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


def test_every_run_is_its_arm_and_its_seed_over_one_cache(tmp_path: Path) -> None:
    path = write_grid(tmp_path, common=["train.lr=1e-3"])
    plan = load_plan(path, ("train.lr=2e-3", "repetitions=3"))
    assert [run.recipe.name for run in plan.runs[:4]] == [
        *("g-untrained-s0", "g-mse-s0", "g-linear-s0", "g-untrained-s1")
    ]
    assert len(plan.runs) == 9
    assert {run.recipe.train.lr for run in plan.runs} == {2e-3}  # the command line wins
    assert [run.recipe.method.kind for run in plan.runs[:3]] == ["dpal", "mse", "dpal"]
    for run in plan.runs:
        assert (run.recipe.seed, run.recipe.train.seed) == (0, run.seed)
        assert run.recipe.cache.url == str(plan.folder / "targets")
        assert run.recipe.data.shards == str(plan.folder / "shards")


def test_an_arm_wins_over_the_command_line(tmp_path: Path) -> None:
    arms = [{"name": "slow", "overrides": ["train.lr=1e-5"]}]
    plan = load_plan(write_grid(tmp_path, arms=arms), ("train.lr=2e-3",))
    assert plan.runs[0].recipe.train.lr == 1e-5


def test_the_command_of_a_row_gives_the_recipe_of_its_run(tmp_path: Path) -> None:
    import shlex

    plan = load_plan(write_grid(tmp_path), ("train.duration=3 steps",))
    dpal, verb, base, *words = shlex.split(plan.runs[1].command)
    assert (dpal, verb) == ("dpal", "train")
    assert load_recipe(base, tuple(words)) == plan.runs[1].recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"armz": []}, "unknown key 'armz'; accepted are name, base"),
        ({"arms": [{"name": "a", "colour": 1}]}, "'arms.0.colour'; accepted are name, label"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "'a' stands twice"),
        ({"arms": []}, "arms is empty; accepted are one and more"),
        (
            {"arms": [{"name": "a", "overrides": ["method=proteus"], "diagnose": True}]},
            "arm 'a': diagnose has no effect with method.kind=proteus; accepted are dpal and mse",
        ),
        (
            {
                "common": ["data.images=[synthetic]", "teacher={kind: taught}"],
                "arms": [
                    {"name": "a"},
                    {
                        "name": "b",
                        "overrides": [
                            *("views.height=128", "views.width=64"),
                            *("student.height=128", "student.width=64"),
                        ],
                    },
                ],
            },
            "a teacher of kind=taught is taught on one",
        ),
        ({"repetitions": 0}, "repetitions=0: input should be greater"),
        ({"base": "other.yaml"}, "other.yaml' does not exist"),
        ({"common": ["train.seed=3"]}, "a grid sets train.seed by itself"),
        ({"arms": [{"name": "a", "overrides": ["method=mze"]}]}, "arm 'a': method"),
        (
            {"arms": [{"name": "a", "untrained": True, "diagnose": True}]},
            "no effect with untrained",
        ),
        ({"arms": [{"name": "a"}, {"name": "b", "overrides": ["seed=1"]}]}, "seed differs"),
    ],
)
def test_a_bad_grid_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plan(write_grid(tmp_path, **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What `prepare` asks of the stages: (stage, method, where targets come from)."""
    asked: list[tuple[str, str, str]] = []

    def stage(name: str) -> Callable[[Recipe], StageResult]:
        def run(recipe: Recipe) -> StageResult:
            asked.append((name, recipe.method.kind, recipe.train.targets))
            return StageResult(name, False, "")

        return run

    for module in (build_shards, cache_features, teach):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "run", stage(name))
    monkeypatch.setattr(grid_worker, "_score_teachers", lambda plan: [])
    return asked


def test_an_arm_without_a_cache_does_not_stand_for_one_that_needs_it(
    tmp_path: Path, stages: list[tuple[str, str, str]]
) -> None:
    arms = [{"name": "asks", "overrides": ["train.targets=online"]}, {"name": "reads"}]
    grid_worker.prepare(load_plan(write_grid(tmp_path, arms=arms)))
    assert stages[1:] == [("cache_features", "dpal", "cached")]


def test_a_teacher_is_taught_even_where_it_is_only_compared_with(
    tmp_path: Path, stages: list[tuple[str, str, str]]
) -> None:
    common = ["data.images=[synthetic]", "teacher={kind: taught}"]
    arms = [{"name": "alone", "overrides": ["method=saip"]}]
    grid_worker.prepare(load_plan(write_grid(tmp_path, arms=arms, common=common)))
    assert stages[1:] == [("teach", "saip", "cached")]


def test_a_full_disk_is_one_sentence_of_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(plan: Plan) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "table.json")

    monkeypatch.setattr(grid_worker, "prepare", full)
    assert grid_worker.main(["prepare", str(write_grid(tmp_path))]) == EXIT_STORAGE
    said = capsys.readouterr().err
    assert said == "dpal ablate: cannot use 'table.json': No space left on device\n"


def do_run(path: Path, number: int) -> None:
    """One run as a worker does it; DeepSpeed starts once in a process."""
    sys.exit(grid_worker.main(["run", str(number), str(path)]))


@pytest.fixture(scope="module")
def done_grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Plan]]:
    """A grid whose every run was done by what the workers call."""
    folder = tmp_path_factory.mktemp("grid")
    small, whole = Shape(48, 2, paper_heads=6, timm_heads=3), SHAPES["vit_tiny"]
    threads = torch.get_num_threads()
    reid = folder / "reid"
    reid.mkdir()
    rows = ["file,pid,cam"]
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = np.full((90, 40, 3), rng.integers(20, 200, 3), np.uint8)
        Image.fromarray(pixels).save(reid / f"{index}.jpg")
        rows.append(f"{index}.jpg,{index // 2},{index % 2}")
    (reid / "labels.csv").write_text("\n".join(rows) + "\n")
    values = tiny_values(folder, duration="2 steps", targets="online")
    values["evaluate"] = [{"task": "reid", "data": str(reid)}]
    path = write_grid(folder, values)
    SHAPES["vit_tiny"] = small
    torch.set_num_threads(1)
    try:
        assert grid_worker.main(["prepare", str(path)]) == EXIT_DONE
        plan = load_plan(path)
        for number in range(len(plan.runs)):
            work = multiprocessing.get_context("fork").Process(target=do_run, args=(path, number))
            work.start()
            work.join(120)
            assert work.exitcode == EXIT_DONE
        yield path, plan
    finally:
        SHAPES["vit_tiny"] = whole
        torch.set_num_threads(threads)


def scores(plan: Plan, arm: str) -> list[float]:
    """mAP of every repetition, from the runs' own evaluations."""
    files = [r.recipe.run_dir / "evaluation.json" for r in plan.runs if r.arm.name == arm]
    return [json.loads(file.read_text())[0]["metrics"]["mAP"] for file in files]


def test_the_table_has_mean_and_sample_deviation_of_every_arm(
    done_grid: tuple[Path, Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    path, plan = done_grid
    ablate.ablate(str(path), (), 1)  # all is done: no process is started
    table = (plan.folder / "table.md").read_text()
    assert "g: reid" in capsys.readouterr().out
    record = json.loads((plan.folder / "table.json").read_text())
    assert [row["label"] for row in record["rows"]] == [
        *("teacher", "untrained", "feature MSE", "linear")
    ]
    for row in record["rows"][1:]:
        (found,) = (v for place, v in row["metrics"].items() if place.startswith("reid"))
        both = scores(plan, row["name"])
        assert row["count"] == 2
        assert found["mAP"]["mean"] == pytest.approx(sum(both) / 2)
        assert found["mAP"]["spread"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5)
        shown = f"{sum(both) / 2:.1f} ± {statistics.stdev(both):.1f}"
        assert f"| {row['label']} | 2 | {shown} |" in table
    assert (record["rows"][1]["seconds"], record["rows"][1]["command"]) == (None, "")
    assert record["rows"][2]["seconds"]["mean"] > 0
    assert plan.runs[1].command in table
    linear = record["rows"][3]["metrics"]["diagnostics"]
    assert "cos identity-shape" in linear
    assert "router entropy" not in linear


def test_repetitions_differ_and_share_the_calibration(done_grid: tuple[Path, Plan]) -> None:
    _, plan = done_grid
    starts = [
        json.loads(line)["identity"]
        for run in plan.runs
        if run.arm.name == "mse"
        for line in (run.recipe.run_dir / "events.jsonl").read_text().splitlines()
        if '"event": "step", "step": 1,' in line
    ]
    assert len(set(starts)) == 2
    assert len(list((plan.folder / "targets").iterdir())) == 1


def test_a_result_of_another_recipe_does_not_count(done_grid: tuple[Path, Plan]) -> None:
    path, plan = done_grid
    assert prepared(plan)
    assert all(finished(plan, run) for run in plan.runs)
    longer = load_plan(path, ("train.lr=1e-5",))
    assert not any(finished(longer, run) for run in longer.runs)
    assert [row.name for row in gather(longer)] == ["teacher"]  # its targets are the same


def test_training_cost_is_of_steps_alone_and_each_counts_once(
    done_grid: tuple[Path, Plan],
) -> None:
    _, plan = done_grid
    events = plan.runs[1].recipe.run_dir / "events.jsonl"
    rows = [json.loads(line) for line in events.read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    seconds = sum(row["data_s"] + row["step_s"] for row in steps)
    cost = training_cost(plan.runs[1].recipe)
    assert cost == pytest.approx((seconds, 16 / seconds))  # two steps of 8 images
    with events.open("a") as file:  # a restart repeats its last step
        file.write(json.dumps(steps[-1]) + "\n")
    assert training_cost(plan.runs[1].recipe) == pytest.approx(cost)


def crew(stop: StopSignal, code: str) -> Crew:
    """Workers that run a line of Python; `a` is the first word of their work."""
    program = (sys.executable, "-c", f"import sys, time; a = sys.argv[1]; {code}")
    return Crew("grid.yaml", (), {}, stop, program)


def pieces(folder: Path, *names: str) -> list[Work]:
    return [Work(name, (name,), folder / f"{name}.log") for name in names]


def test_a_failing_run_is_told_with_its_log_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "print('no images of', a); sys.exit(3 if a == 'b' else 0)"
    failures = crew(StopSignal(), code).run(pieces(tmp_path, "a", "b", "c"), 2, "ablate", 3)
    assert [(work.name, code) for work, code in failures] == [("b", EXIT_DATA)]
    assert (tmp_path / "c.log").read_text() == "no images of c\n"
    error = ablate._failed(failures)
    assert isinstance(error, DpalError)
    assert error.exit_code == EXIT_DATA
    assert str(tmp_path / "b.log") in str(error)
    assert "b: exit code 3: no images of b" in capsys.readouterr().err


def test_a_stop_ends_the_workers_and_begins_no_other(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); "
        "time.sleep(60)"
    )
    stop = StopSignal()

    def ask() -> None:
        while "up" not in ablate.last_line(tmp_path / "a.log"):
            pass
        stop.received = signal.SIGTERM

    asking = threading.Thread(target=ask)
    asking.start()
    failures = crew(stop, code).run(pieces(tmp_path, "a", "b"), 1, "ablate", 2)
    asking.join()
    assert [(work.name, code) for work, code in failures] == [("a", 75)]
    assert not (tmp_path / "b.log").exists()


def test_no_more_workers_than_asked_for_run_at_once(tmp_path: Path) -> None:
    code = (
        f"import os; p = {str(tmp_path)!r}; open(p + '/on-' + a, 'w').close(); "
        "print(sum(n.startswith('on-') for n in os.listdir(p))); time.sleep(.3); "
        "os.remove(p + '/on-' + a)"
    )
    assert crew(StopSignal(), code).run(pieces(tmp_path, *"abcd"), 2, "ablate", 4) == []
    seen = [int((tmp_path / f"{name}.log").read_text()) for name in "abcd"]
    assert max(seen) == 2


def test_measures() -> None:
    assert Measure.of([4.0]) == (4.0, None, 1)
    assert Measure.of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5), 2)


def test_kept_pictures_are_those_of_the_files_until_a_file_changes(tmp_path: Path) -> None:
    file, kept = tmp_path / "a.png", tmp_path / "kept"
    Image.fromarray(np.full((20, 10, 3), 40, np.uint8)).save(file)
    (plain,) = pictures([file], (8, 4))
    for _ in range(2):
        (image,) = pictures([file], (8, 4), kept)
        assert np.array_equal(image, plain)
    assert len(list(kept.iterdir())) == 1
    Image.fromarray(np.full((20, 10, 3), 90, np.uint8)).save(file)
    os.utime(file, ns=(1, 1))
    (image,) = pictures([file], (8, 4), kept)
    assert image.max() == 90
