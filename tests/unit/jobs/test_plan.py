"""`dpal plan`: bytes are those of real shards and caches; the command, its files and its sentences.

Takes about 15 s.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.feature_cache import open_cache_store, series_of
from data_tools.manifest import manifest_of
from dpal.base.config import load_recipe, resolve_recipe
from dpal.base.errors import (
    EXIT_BUG,
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STORAGE,
    ConfigError,
    DpalError,
)
from dpal.base.recipe import Recipe
from dpal.base.teachers import teacher_name
from dpal.record import Kind
from jobs.caching.worker import ShardWorker
from jobs.plan import plan
from jobs.planning.measure import _student, measure
from jobs.planning.miniature import Miniature
from jobs.planning.rates import (
    Loading,
    Node,
    Origin,
    Prices,
    Rates,
    Store,
    TeacherRate,
    read_rates,
    split_words,
    write_rates,
)
from jobs.planning.table import bytes_text, count_text, counted, time_text
from jobs.planning.workload import Size, num_patches, sharded_bytes, workload

from command import call
from tiny import fill_cache, tiny_recipe, tiny_values, write_recipe

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
SAIP = ROOT / "jobs" / "recipes" / "saip.yaml"


def made_rates(recipe: Recipe, width: int = 192, **changes: Any) -> Rates:
    teachers = tuple(
        TeacherRate(
            name=teacher_name(spec), width=width, base_images_per_s=200, composite_images_per_s=90
        )
        for spec in recipe.aligned_teachers
    )
    rates = Rates(
        measured=Origin(
            date="2026-01-02",
            machine="a made-up machine",
            device="a made-up device",
            recipe=recipe.name,
            views=f"{recipe.views.height}x{recipe.views.width}",
            student=recipe.student.name,
            method=recipe.method.kind,
            codec=recipe.cache.codec,
        ),
        image_bytes=5000,
        student_samples_per_s=40,
        teachers=teachers,
        loading=Loading(
            train_samples_per_s_core=900,
            cache_samples_per_s_core=800,
            target_read_gb_per_s_core=2,
            target_write_gb_per_s_core=0.3,
        ),
        store=Store(read_mb_per_s=500, write_mb_per_s=400),
        node=Node(devices=8, cores=64),
    )
    return rates.model_copy(update=changes)


@pytest.fixture(scope="module")
def demo_rates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rates") / "rates.yaml"
    write_rates(path, made_rates(load_recipe(DEMO)))
    return path


# ------------------------------------------------------------------------- bytes of real files


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny recipe with its shards; tests only read it, or add caches of their own."""
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("codec", ["int8", "fp32", "pca64-int8", "phis-int4"])
def test_targets_are_predicted_to_the_byte_and_their_folder_within_two_per_cent(
    sharded: Recipe, codec: str
) -> None:
    cache = sharded.cache.model_copy(update={"codec": codec})
    recipe = sharded.model_copy(update={"cache": cache})
    fill_cache(recipe)
    work = workload(recipe, made_rates(recipe), Size())
    assert work.images == 40
    worker = ShardWorker(recipe)
    store = open_cache_store(recipe, worker.definition)
    tars = [
        f"{series}/{ref.name}"
        for series in series_of(recipe.views)
        for ref in worker.manifest.shards
    ]
    measured = sum(store.size(name) for name in tars)
    assert work.target_bytes - work.teachers[0].fixed_bytes == measured
    names = [*store.list("")]
    whole = sum(store.size(name) for name in names)
    assert work.target_bytes == pytest.approx(whole, rel=0.02)
    assert 0 <= len(names) - work.target_objects <= 2  # small files that say what the cache is of


def test_shards_are_counted_from_their_manifest(sharded: Recipe) -> None:
    recipe = sharded
    manifest = manifest_of(recipe)
    work = workload(recipe, made_rates(recipe), Size())
    assert work.shard_bytes == pytest.approx(sum(ref.num_bytes for ref in manifest.shards))
    assert work.shards == len(manifest.shards)
    larger = workload(recipe, made_rates(recipe), Size(images=400_000))
    assert larger.shard_bytes == pytest.approx(10_000 * work.shard_bytes)
    assert larger.shards == 40_000


def test_shards_are_predicted_from_the_images_within_two_per_cent(sharded: Recipe) -> None:
    recipe = sharded
    images = sorted((Path(recipe.output).parent / "persons").iterdir())
    mean = sum(path.stat().st_size for path in images) / len(images)
    manifest = manifest_of(recipe)
    predicted = 40 * sharded_bytes(mean, 10)
    assert predicted == pytest.approx(sum(ref.num_bytes for ref in manifest.shards), rel=0.02)


def test_the_grid_is_that_of_the_targets(sharded: Recipe) -> None:
    values = tiny_values(Path(sharded.output).parent)
    values["views"] = {**values["views"], "height": 256, "width": 128}
    values["teacher"] = {**values["teacher"], "input": [256, 128]}
    for student in ({"height": 256, "width": 128}, {"height": 128, "width": 64}):
        recipe = resolve_recipe({**values, "student": student})
        definition = ShardWorker(recipe).definition
        kinds: tuple[Kind, Kind] = ("view", "composite")
        for kind, grid in zip(kinds, (definition.grid, definition.composite_grid), strict=True):
            assert num_patches(recipe, kind) == grid[0] * grid[1]


# ------------------------------------------------------------------------------- rates files


def test_rates_survive_their_file_to_four_digits(tmp_path: Path) -> None:
    rates = made_rates(load_recipe(DEMO), prices=Prices(device_hour=1.23456))
    write_rates(tmp_path / "rates.yaml", rates)
    again = read_rates(tmp_path / "rates.yaml")
    assert again == rates.model_copy(update={"prices": Prices(device_hour=1.235)})


def test_words_change_rates_and_the_rest_is_for_the_recipe(demo_rates: Path) -> None:
    recipe_words, words = split_words(("rates.node.cores=96", "views.count=4"))
    assert recipe_words == ("views.count=4",)
    assert read_rates(demo_rates, words).node.cores == 96
    one = read_rates(demo_rates, ("rates.teachers.0.width=1024",))
    assert one.teachers[0].width == 1024


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("rates.node.coers=9", "node.cores"),
        ("rates.nonsense.at.all=1", "unknown key 'nonsense'"),
        ("rates.store.read_mb_per_s=0", "store.read_mb_per_s=0"),
        ("rates.student_samples_per_s=1e400", "student_samples_per_s=inf"),
        ("rates.node.devices=many", "node.devices=many"),
        ("rates.teachers.5.width=3", "rates.teachers.0"),
        ("rates.format=2", "format=2"),
        ("rates.=3", "rates.key=value"),
        ("views.count=0", "views.count=0"),
        ("cache.codec=pca400-int8", "192 channels"),
        ("teacher.width=256", "teacher.width=256"),
        ("method=nonsense", "method.kind=nonsense"),
    ],
)
def test_a_wrong_word_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], demo_rates: Path, word: str, told: str
) -> None:
    answer = call(capsys, "plan", DEMO, "--rates", demo_rates, word)
    assert answer.code == EXIT_CONFIG
    assert told in answer.sentence


def test_other_mistakes_are_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], demo_rates: Path, tmp_path: Path
) -> None:
    for words, told in (
        (("--images", "0"), "--images 0: accepted are numbers above 0"),
        (("--images", "1e300"), "--images 1e+300: accepted are numbers above 0, up to 1e+12"),
        (("--students", "1e308"), "--students 1e+308"),
        (("--devices", "-8"), "--devices -8"),
        (("--epochs", "-1"), "--epochs -1"),
        (("--epochs", "nan"), "--epochs nan"),
        (("--epochs", "inf"), "--epochs inf"),
        (("data.images=[photos]",), "teacher.kind=taught"),
    ):
        answer = call(capsys, "plan", DEMO, "--rates", demo_rates, *words)
        assert answer.code == EXIT_CONFIG
        assert told in answer.sentence
    answer = call(capsys, "plan", DEMO, "--rates", tmp_path)
    assert answer.code == EXIT_CONFIG
    assert "is a folder" in answer.sentence
    answer = call(capsys, "plan", DEMO, "--rates", tmp_path / "none.yaml")
    assert answer.code == EXIT_CONFIG
    assert "--measure" in answer.sentence
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert call(capsys, "plan", DEMO, "--rates", empty).code == EXIT_CONFIG
    answer = call(capsys, "plan", DEMO, "--rates", demo_rates, "--json", tmp_path / "no" / "f.json")
    assert answer.code == EXIT_STORAGE


@pytest.mark.parametrize("count", ["inf", "1e400", "nan", "1.5", "many"])
def test_a_count_that_is_no_whole_number_is_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], demo_rates: Path, count: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(capsys, "plan", DEMO, "--rates", demo_rates, "--images", count)
    assert f"--images: '{count}': accepted are whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--images", "--students", "--epochs", "--devices", "--json"])
def test_an_option_without_effect_on_a_measurement_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    answer = call(capsys, "plan", DEMO, "--measure", tmp_path / "rates.yaml", option, "7")
    assert answer.code == EXIT_CONFIG
    assert f"{option} has no effect with --measure" in answer.sentence


def test_a_measurement_whose_process_was_killed_says_so_and_has_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    recipe = load_recipe(DEMO, (f"output={tmp_path}",))
    with pytest.raises(DpalError, match="signal 9") as told:
        _student(Miniature(recipe, "none", 1.0, "cpu", 1, 1))
    assert told.value.exit_code == EXIT_BUG


def test_rates_of_another_number_of_teachers_are_refused() -> None:
    recipe = load_recipe(DEMO)
    with pytest.raises(ConfigError, match="1 teachers, the rates are of 0"):
        workload(recipe, made_rates(recipe, teachers=()), Size(images=10))


# -------------------------------------------------------------------------------- the command


def test_the_table_and_the_json_say_the_same(
    capsys: pytest.CaptureFixture[str], demo_rates: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    words = ("--images", "1e7", "--students", 5, "--epochs", 100, "--devices", 64)
    answer = call(
        capsys, "plan", DEMO, "--rates", demo_rates, *words, "--json", path, "train.lanes=64",
        "data.shards=s3://bucket/shards", "cache.url=s3://bucket/targets",
    )  # fmt: skip
    assert answer.code == EXIT_DONE
    record = json.loads(path.read_text())
    assert record["workload"]["images"] == 10**7
    assert record["plan"]["nodes"] == 8
    bottleneck = next(line for line in answer.printed.splitlines() if "bottleneck" in line)
    assert bottleneck.split()[1] == record["plan"]["cache"]["limits"][0]["name"]
    assert f"cheaper: {record['plan']['cheaper']}" in answer.printed
    assert bytes_text(record["workload"]["target_bytes"]) in answer.printed


LARGEST = Size(10**10, students=10**4, epochs=1000.0, devices=4096)
SMALLEST = Size(10_000, epochs=1.0)


@pytest.mark.parametrize("size", [LARGEST, SMALLEST], ids=["largest", "smallest"])
@pytest.mark.parametrize("where", ["s3://bucket/", ""])
def test_a_table_fits_eighty_columns_and_its_cells_stand_apart(
    demo_rates: Path, size: Size, where: str
) -> None:
    words = (
        f"data.shards={where}shards",
        f"cache.url={where}targets",
        "views.count=12",
        "teacher={kind: timm, name: vit_small_patch14_dinov2.lvd142m, input: [252, 126]}",
        "rates.prices.currency=rupees",
    )
    planned = plan(str(DEMO), words, str(demo_rates), size)
    assert planned.warnings
    lines = planned.text().splitlines()
    assert max(len(line) for line in lines) <= 80
    for label, count in (("  12 base views", 5), ("images/s", 3), ("total", 2)):
        cells = next(line for line in lines if line.startswith(f"{label} ")).removeprefix(label)
        assert len(re.split("  +", cells.strip())) == count


def test_a_plan_from_given_rates_starts_without_torch(demo_rates: Path) -> None:
    code = (
        "import sys; from jobs.__main__ import main;"
        f"code = main(['plan', {str(DEMO)!r}, '--rates', {str(demo_rates)!r}, '--images', '1e9']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'ray', 'timm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_table_in_the_docs_is_what_its_command_prints(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^dpal plan jobs(?:.*\\\n)*.*$", text, re.MULTILINE)
    (shown,) = re.findall(r"```text\n([^`]*^STORED[^`]*)```", text, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("\\\n", " "))[1:]
    answer = call(capsys, *words[: words.index("--json")])
    assert answer.code == EXIT_DONE
    printed = [line for line in answer.printed.splitlines() if line]
    assert set(shown.split("\n")) - {""} <= set(printed)
    assert len(printed) - len([line for line in shown.splitlines() if line]) == 6  # left out


def warnings(*words: str, rates: Path, size: Size) -> str:
    return "\n".join(plan(str(DEMO), words, str(rates), size).warnings)


def test_warnings_name_what_will_hurt_and_are_silent_where_nothing_does(demo_rates: Path) -> None:
    remote = ("data.shards=s3://b/shards", "cache.url=s3://b/targets")
    good = (*remote, "data.samples_per_shard=4096", "train.global_batch=2048")
    good = (*good, "storage.copies_gb=200")
    assert warnings(*good, rates=demo_rates, size=Size(10**8, devices=8)) == ""
    found = warnings(*remote, rates=demo_rates, size=Size(10**8, devices=48))
    assert "32 lanes, which 48 devices cannot share" in found
    assert "requests cost more than bytes" in found
    small = (*good[:-1], "storage.copies_gb=0.5")
    assert "storage.copies_gb=0.5" in warnings(
        *small, rates=demo_rates, size=Size(10**8, devices=8)
    )
    large = (
        *remote,
        "data.samples_per_shard=131072",
        "cache.codec=fp32",
        "train.global_batch=2048",
    )
    assert "held in memory whole" in warnings(*large, rates=demo_rates, size=Size(10**8, devices=8))
    slow = (*good, "rates.store.read_mb_per_s=2")
    found = warnings(*slow, rates=demo_rates, size=Size(10**8, devices=8))
    assert "the cache job would read" in found
    assert "cached training would read" in found
    assert "where a node reads 2 MB/s" in found
    slow = (*good, "rates.store.write_mb_per_s=3")
    found = warnings(*slow, rates=demo_rates, size=Size(10**8, devices=8))
    assert "the cache job would write" in found
    assert "would read" not in found
    local = ("train.global_batch=2048",)
    assert warnings(*local, rates=demo_rates, size=Size(10**8, devices=8)) == ""
    found = warnings(*local, rates=demo_rates, size=Size(10**8, devices=16))
    assert "data.shards and cache.url: local folders" in found
    named = (*good, "rates.teachers.0.name=another")
    assert "teacher 0 taught (another)" in warnings(
        *named, rates=demo_rates, size=Size(10**8, devices=8)
    )
    other = (*good, "student.name=vit_small")
    assert "student.name vit_small (vit_tiny)" in warnings(
        *other, rates=demo_rates, size=Size(10**8, devices=8)
    )


def test_words_make_the_recipe_use_the_planned_devices(demo_rates: Path) -> None:
    """Which it would not by itself: it has one process and one actor, and its actor no GPU."""
    size = Size(10**6, devices=16)
    found = plan(str(DEMO), (), str(demo_rates), size)
    wanted = "train.processes=8 job.nodes=2 job.gpus_per_node=8 cache.actors=16"
    assert found.words == (*wanted.split(), "cache.gpus_per_actor=1")
    assert "cache.actors=16 cache.gpus_per_actor=1" in " ".join(found.text().split())
    again = plan(str(DEMO), found.words, str(demo_rates), size)
    assert again.words == ()
    assert "on these devices" not in again.text()
    cpu = ("rates.node.teacher_cores=1", "rates.node.student_cores=1")
    assert not any("gpu" in word for word in plan(str(DEMO), cpu, str(demo_rates), size).words)
    assert plan(str(DEMO), (), str(demo_rates), Size(10**6, devices=9)).words == ()  # 5 and 4
    words = plan(str(SAIP), ("rates.teachers=[]",), str(demo_rates), size).words
    assert not any(word.startswith("cache.") for word in words)


def test_a_size_that_is_advised_keeps_every_device_busy(demo_rates: Path) -> None:
    remote = ("data.shards=s3://b/shards", "cache.url=s3://b/targets")
    large = (*remote, "data.samples_per_shard=4096", "train.global_batch=2048")
    few = warnings(*large, rates=demo_rates, size=Size(10_000, devices=8))
    assert "3 shards for 8 devices" in few
    assert "data.samples_per_shard=1250 gives each one" in few
    mended = (*remote, "data.samples_per_shard=1250", "train.global_batch=2048")
    assert warnings(*mended, rates=demo_rates, size=Size(10_000, devices=8)) == ""
    none = warnings(*large, rates=demo_rates, size=Size(10_000, devices=512))
    assert "that job is as fast on fewer" in none  # not: shards of 19 images
    assert "gives each one" not in none
    # One million on 32 devices: 16,384 are advised for bytes alone; on 512, each gets a shard.
    for devices, advised in ((32, 16_384), (512, 1024)):
        found = warnings(*remote, rates=demo_rates, size=Size(10**6, devices=devices))
        assert f"data.samples_per_shard={advised} makes" in found
        assert -(-(10**6) // advised) >= devices


def test_a_batch_that_the_devices_cannot_share_comes_with_one_that_they_can(
    demo_rates: Path,
) -> None:
    found = warnings(rates=demo_rates, size=Size(10**6, devices=6))
    assert "times 6 devices; 192 is" in found
    mended = ("train.global_batch=192", "train.lanes=6")
    assert "devices" not in warnings(*mended, rates=demo_rates, size=Size(10**6, devices=6))


def test_rates_of_other_pinned_views_or_another_teacher_are_told(demo_rates: Path) -> None:
    words = ("rates.measured.pinned=4 + 1", "rates.teachers.0.name=another")
    found = warnings(*words, rates=demo_rates, size=Size(10**6))
    assert "pinned views 2 + 1 (4 + 1)" in found
    assert "bytes are those of rates.teachers.0.width=192" in found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (bytes_text(98_304), "98.3 kB"),
        (bytes_text(999_600), "1 MB"),
        (bytes_text(3.99e15), "3.99 PB"),
        (bytes_text(346.4e18), "346 EB"),
        (count_text(999_999_999), "1 billion"),
        (count_text(999_900), "999,900"),
        (counted(1, "epoch"), "1 epoch"),
        (counted(0.5, "epoch"), "0.5 epochs"),
        (count_text(12_740), "12,740"),
        (count_text(10**10), "10 billion"),
        (time_text(75.0), "75 s"),
        (time_text(7300), "2.03 h"),
        (time_text(1e6), "11.6 days"),
    ],
)
def test_numbers_are_written_for_people(text: str, wanted: str) -> None:
    assert text == wanted


# -------------------------------------------------------------------------------- measurement


def test_a_measurement_is_of_this_machine_and_leaves_the_run_alone(
    sharded: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.planning.measure.ENOUGH_S", 0.1)
    monkeypatch.setattr("jobs.planning.miniature.CPU_IMAGES", 8)
    recipe = sharded
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.output).rglob("*")}
    place = tmp_path / "measured"
    place.mkdir()
    rates = measure(recipe, place)
    assert before == {path: path.stat().st_mtime_ns for path in Path(recipe.output).rglob("*")}
    assert rates.teachers[0].width == 192
    assert rates.teachers[0].composite_images_per_s < rates.teachers[0].base_images_per_s
    assert "recipe's own" in rates.measured.images
    assert 1 < rates.student_samples_per_s < rates.loading.train_samples_per_s_core < 1e5
    path = tmp_path / "rates.yaml"
    write_rates(path, rates)
    planned = plan(str(write_recipe(recipe, tmp_path / "tiny.yaml")), (), str(path), Size())
    assert planned.plan.cache is not None
    assert planned.plan.cache.bottleneck in ("teacher", "decode")
