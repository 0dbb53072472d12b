"""Every recipe that comes with the project resolves, and is what its name says."""

from pathlib import Path

import pytest

from dpal.base.config import load_recipe
from dpal.base.errors import EXIT_CONFIG, EXIT_DONE
from dpal.base.methods import Proteus, TinyMim
from dpal.base.recipe import Recipe
from dpal.base.saip import Saip
from dpal.views.plan import ViewPlan
from jobs.__main__ import main

FOLDER = Path(__file__).parents[3] / "jobs" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
GRIDS = sorted((FOLDER / "grids").glob("*.yaml"))


def recipe(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


def test_there_is_a_recipe_for_every_method() -> None:
    kinds = {load_recipe(path).method.kind for path in FILES}
    assert kinds == {"dpal", "mse", "proteus", "tinymim", "saip"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_resolves_and_says_what_it_is(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(path), "--dry-run"]) == EXIT_DONE
    shown = capsys.readouterr().out  # the resolved recipe
    assert f"name: {load_recipe(path).name}" in shown
    text = path.read_text()
    assert text.startswith("# "), "a recipe begins with what it is"


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_a_grid_resolves_and_repeats_every_arm(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", str(path), "--dry-run", "repetitions=2"]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()[1:]
    names = [line.split()[0] for line in lines]
    arms = dict.fromkeys(name.rpartition("-s")[0] for name in names)
    assert names == [f"{arm}-s{seed}" for seed in (0, 1) for arm in arms]


def test_no_two_recipes_share_a_run_folder() -> None:
    names = [load_recipe(path).name for path in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "base_lr", "per"),
    [
        ("dpal", 2.5e-4, 256),
        ("dpal_swin", 2.5e-4, 256),
        ("mse", 2.5e-4, 256),
        ("proteus", 5e-4, 512),
        ("tinymim", 1.5e-4, 256),
        ("saip", 2.5e-4, 256),
    ],
)
def test_the_rate_follows_the_references_rule_and_the_job_can_hold_it(
    name: str, base_lr: float, per: int
) -> None:
    train, job = recipe(name).train, recipe(name).job
    assert train.lr == pytest.approx(base_lr * train.global_batch / per)
    ranks = job.nodes * train.processes
    assert train.processes == job.gpus_per_node
    assert train.global_batch % (train.micro_batch * ranks) == 0


@pytest.mark.parametrize("name", ["dpal", "dpal_swin", "mse", "proteus", "tinymim"])
def test_a_teacher_of_a_long_run_sees_two_geometries_plain_and_flipped(name: str) -> None:
    views = recipe(name).views
    assert views.count == type(views)().count == 4
    plan = ViewPlan(0, views)
    shown = {plan.base("k", plan.view_index("k", epoch), (400, 200)) for epoch in range(4)}
    assert len(shown) == 4
    assert len({spec.box for spec in shown}) == 2


def test_the_methods_own_numbers() -> None:
    proteus, tinymim, saip = recipe("proteus"), recipe("tinymim"), recipe("saip")
    assert isinstance(proteus.method, Proteus)
    assert (proteus.train.ema, proteus.student.drop_path) == (0.99996, 0.0)
    assert (proteus.train.start_lr, proteus.train.end_lr) == (1e-6, 1e-5)
    assert isinstance(tinymim.method, TinyMim)
    assert tinymim.teacher is not None
    assert tinymim.teacher.tap == "block9"  # relations of block 10, the last that PATH trained
    assert (tinymim.train.global_batch, tinymim.student.drop_path) == (4096, 0.1)
    assert isinstance(saip.method, Saip)
    assert (saip.teacher, saip.method.prototypes) == (None, 65536)
    dpal = recipe("dpal")
    assert (dpal.train.global_batch, dpal.train.duration) == (2048, "200 epochs")
    assert (dpal.loss.identity, dpal.loss.shape, dpal.loss.relation) == (1, 1, 1)
    assert recipe("dpal_swin").decoder.patterns == 2
    assert len(recipe("several_teachers").teachers) == 2


def test_a_list_is_asked_for_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    one = "more_teachers={kind: mobilesam, weights: a.pt}"
    assert main(["train", str(FOLDER / "demo.yaml"), one, "--dry-run"]) == EXIT_CONFIG
    assert capsys.readouterr().err == "dpal train: more_teachers: accepted is a list, [...]\n"
    assert main(["explain", "more_teachers"]) == EXIT_DONE
    assert "a list of teachers beside `teacher`" in capsys.readouterr().out
