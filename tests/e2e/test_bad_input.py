"""Bad images, recipes and credentials: one sentence, the right exit code, nothing half-written."""

import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpal.base.config import resolve_recipe
from dpal.base.recipe import Recipe

from command import call, checked, files
from seaweed import KEY, S3Server, kill_s3, start_s3
from tiny import tiny_values, write_persons

Capture = pytest.CaptureFixture[str]
WRONG_SECRET = "hunter2-wrong-value"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound recipe file; nothing of it was run."""
    folder = tmp_path_factory.mktemp("sound")
    sound: Recipe = resolve_recipe(tiny_values(folder))
    path = folder / "recipe.yaml"
    path.write_text(sound.to_yaml())
    return path


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server, process = start_s3(tmp_path_factory.mktemp("s3"))
    yield server
    kill_s3(process)


def write_bomb(path: Path, side: int = 50_000) -> Path:
    """A whole and valid PNG of side x side one-bit pixels: some 300 kB, 2.5 GB when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def rejects(dest: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, (dest / "rejects.jsonl").read_text().splitlines())
    return [(Path(row["source"]).name, row["reason"]) for row in rows]


# ------------------------------------------------------------------------------------ images


def test_a_missing_folder(tmp_path: Path, capsys: Capture) -> None:
    answer = call(capsys, "shard", tmp_path / "nowhere", tmp_path / "out")
    assert answer.code == 3
    assert f"{str(tmp_path / 'nowhere')!r} does not exist" in answer.sentence
    assert files(tmp_path) == set()


def test_an_empty_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "in").mkdir()
    answer = call(capsys, "shard", tmp_path / "in", tmp_path / "out")
    assert answer.code == 3
    assert "is empty: accepted are folders of JPEG or PNG" in answer.sentence
    assert files(tmp_path) == set()


def test_a_folder_of_text_files(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"{index}.txt").write_text("a person walks by\n")
    answer = call(capsys, "shard", tmp_path / "in", tmp_path / "out")
    assert answer.code == 3
    assert "no image among 3 files" in answer.sentence
    assert files(tmp_path / "out") == set()


def test_a_truncated_jpeg_among_good_ones_is_listed_and_counted(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = write_persons(tmp_path / "in", 8)
    truncate(folder / "003.jpg")
    answer = call(capsys, "shard", folder, tmp_path / "out")
    assert answer.code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_samples"] == 7
    assert manifest["rejected"] == {"undecodable": 1}
    assert rejects(tmp_path / "out") == [("003.jpg", "undecodable")]


def test_a_truncated_jpeg_alone(tmp_path: Path, capsys: Capture) -> None:
    truncate(write_persons(tmp_path / "in", 1) / "000.jpg")
    answer = call(capsys, "shard", tmp_path / "in", tmp_path / "out")
    assert answer.code == 3
    assert "1 of 1 images are rejected (1 undecodable)" in answer.sentence
    assert rejects(tmp_path / "out") == [("000.jpg", "undecodable")]
    assert files(tmp_path / "out") == {str(tmp_path / "out" / "rejects.jsonl")}


def test_a_png_bomb_is_rejected_in_little_memory(tmp_path: Path, capsys: Capture) -> None:
    bomb = write_bomb(write_persons(tmp_path / "in", 8) / "bomb.png")
    assert bomb.stat().st_size < 1_000_000
    assert call(capsys, "shard", tmp_path / "in", tmp_path / "out").code == 0
    assert rejects(tmp_path / "out") == [("bomb.png", "too_large")]

    alone = tmp_path / "alone"
    alone.mkdir()
    bomb.rename(alone / "bomb.png")
    # VmHWM, not ru_maxrss: the latter starts at the size of the process that forked this one.
    code = (
        "import sys; from jobs.__main__ import main; code = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read()); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "shard", str(alone), str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = checked("shard", done.returncode, "", done.stderr)
    assert answer.code == 3
    assert answer.sentence.startswith("1 of 1 images are rejected (1 too_large)")
    peak_kb = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    assert peak_kb < 400 * 1024, "the pixels alone would take millions"


# ----------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.lerning_rate=1"], "unknown recipe key 'train.lerning_rate'"),
        (["train.global_bach=8"], "the nearest valid name is 'train.global_batch'"),
        (["trian.lr=1e-3"], "the nearest valid name is 'train'"),
        (["train.lr=-1e-3"], "train.lr=-0.001: input should be greater than 0"),
        (["train.lr=fast"], "train.lr=fast: "),
        (["train.lr="], "train.lr=: input should be a valid number"),
        (["train.lr"], "is not of the form key=value"),
        (["train.lr.peak=1"], "'lr' is not a section"),
        (["train.global_batch=8", "train.micro_batch=3"], "is not a multiple of train.micro_ba"),
        (["name=Not A Name"], "name=Not A Name: "),
        (["teacher.kind=oracle"], "teacher"),
        (["views.height=100"], "views.height=100"),
        (["train.duration=a while"], "train.duration=a while: "),
        (["data.images=[]"], "data.images"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(
    overrides: list[str], expected: str, recipe: Path, capsys: Capture
) -> None:
    before = files(recipe.parent)
    answer = call(capsys, "train", recipe, *overrides)
    assert answer.code == 2
    assert expected in answer.sentence
    assert files(recipe.parent) == before


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (b"train: [1, 2\nname: x\n", "not valid YAML"),
        (b"name: tiny\n\tdata: {}\n", "line 2: not valid YAML"),
        (bytes(range(256)), "is not a text file"),
        (b"PK\x03\x04\x00\x00", "not valid YAML"),
        (b"", "is empty or not a mapping"),
        (b"just some words\n", "is empty or not a mapping"),
        (b"? [a, list]\n: is no key\n", "not valid YAML"),
        (b"name: x\ndata: {images: [x]}\nteacher: {kind: taught}\n1: a number\n", "1=1: keys"),
        (b"!!python/object/apply:os.system ['exit 9']\n", "not valid YAML"),
        (b"name: tiny\n", "recipe key 'data.images' is required"),
        (b"name: tiny\ndata: people\nteacher: 3\n", "data=people"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_recipe(
    contents: bytes | None, expected: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "recipe.yaml"
    if contents is not None:
        path.write_bytes(contents)
    answer = call(capsys, "run", path)
    assert answer.code == 2
    assert expected in answer.sentence
    assert files(tmp_path) <= {str(path)}


def test_stages_out_of_order_name_the_stage_that_is_missing(recipe: Path, capsys: Capture) -> None:
    before = files(recipe.parent)
    for verb in ("cache", "train"):
        answer = call(capsys, verb, recipe)
        assert answer.code == 3
        assert "run `dpal shard`" in answer.sentence
    assert files(recipe.parent) == before


def test_an_output_that_is_a_file(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "taken").write_text("")
    answer = call(capsys, "run", recipe, f"output={tmp_path / 'taken'}")
    assert answer.code == 4
    assert str(tmp_path / "taken") in answer.sentence
    assert files(tmp_path) == {str(tmp_path / "taken")}


def test_a_reader_that_leaves_early_is_no_error(recipe: Path) -> None:
    command = [sys.executable, "-m", "jobs", "train", str(recipe), "--dry-run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # `dpal train recipe.yaml --dry-run | head -0`
    _out, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "")


# ------------------------------------------------------------------------------- credentials


def test_a_wrong_s3_key_ends_every_verb_at_once(
    s3: S3Server, recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG_SECRET)
    images, url = write_persons(tmp_path / "in", 2), s3.url()
    before = files(tmp_path, recipe.parent)
    in_recipe = [f"storage.key={KEY}", f"storage.secret={WRONG_SECRET}"]
    for words in (
        ("shard", images, url),
        ("shard", url, tmp_path / "out"),
        ("audit", url),
        ("cache", recipe, f"data.shards={url}", *in_recipe),
        ("train", recipe, f"data.shards={url}", *in_recipe),
    ):
        asked = time.monotonic()
        answer = call(capsys, *words)
        assert answer.code == 4, words
        assert "refuses these credentials" in answer.sentence
        assert time.monotonic() - asked < 5, "no retries"
        assert WRONG_SECRET not in answer.printed
        assert KEY not in answer.sentence
    assert files(tmp_path, recipe.parent) == before
