"""Sharding folders: policy, determinism, resumption, and what is refused."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.manifest import Manifest, load_manifest
from data_tools.policy import Refused, judge
from data_tools.shard import read_shard
from data_tools.source import Item
from data_tools.storage import LocalStore
from dpal.base.errors import ConfigError, DataError, StorageError
from dpal.base.inputs import Data, Storage
from jobs.build_shards import build_shards

POLICY = Data(images=("unused",), samples_per_shard=8)


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (64, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, count: int, start: int = 0) -> Path:
    for seed in range(start, start + count):
        kind = "PNG" if seed % 5 == 0 else "JPEG"
        path = folder / f"d{seed % 3}" / f"{seed}.{'png' if kind == 'PNG' else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed, kind))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def build(*sources: Path, dest: Path, data: Data = POLICY) -> Manifest:
    return build_shards([str(source) for source in sources], str(dest), data, Storage())


def rejects(dest: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (dest / "rejects.jsonl").read_text().splitlines()]
    return {Path(row["source"]).name: row["reason"] for row in rows}


def test_every_image_is_in_the_shards_with_its_own_bytes(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 20)
    manifest = build(source, dest=tmp_path / "out")
    assert [ref.num_samples for ref in manifest.shards] == [8, 8, 4]
    store, found = LocalStore(tmp_path / "out"), {}
    for ref in load_manifest(store).shards:
        shard = read_shard(store, ref, None)
        for index in range(len(shard)):
            meta = shard.meta(index)
            assert (meta["height"], meta["width"]) == (64, 40)
            found[meta["source"]] = shard.image_bytes(index)
    assert found == contents(source)


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    build(write_images(tmp_path / "in", 20), dest=tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("persons-*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 20
    for sample in samples:
        image = sample["jpg"] if "jpg" in sample else sample["png"]
        assert image.shape == (sample["json"]["height"], sample["json"]["width"], 3)
    assert [sample["__key__"] for sample in samples] == sorted(s["__key__"] for s in samples)


def test_the_order_and_place_of_folders_change_no_byte_of_the_shards(tmp_path: Path) -> None:
    first = write_images(tmp_path / "a", 9)
    second = write_images(tmp_path / "b", 9, start=9)
    shutil.copy(first / "d0/0.png", second / "same-bytes-other-name.png")
    build(first, second, dest=tmp_path / "one")
    moved = shutil.copytree(second, tmp_path / "moved")
    build(moved, first, dest=tmp_path / "two")
    keep = ("manifest.json", "persons-")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {k: v for k, v in one.items() if k.startswith(keep)} == {
        k: v for k, v in two.items() if k.startswith(keep)
    }
    assert len(one) == 3 + 3


def test_every_rejected_file_is_counted_and_listed_with_its_reason(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 40)
    good = (source / "d1/1.jpg").read_bytes()
    (source / "copy.jpg").write_bytes(good)
    (source / "cut.jpg").write_bytes(good[: len(good) // 2])
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.png").write_text("not an image")
    (source / "labels.csv").write_text("file,pid\n")
    (source / "tiny.jpg").write_bytes(picture(99, size=(64, 31)))
    (source / "large.png").write_bytes(picture(98, "PNG", size=(300, 300)))
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(source / "pipe.jpg")
    manifest = build(source, dest=tmp_path / "out", data=POLICY.model_copy(
        update={"max_pixels": 200 * 200}))  # fmt: skip
    wanted = {
        "copy.jpg": "duplicate", "cut.jpg": "undecodable", "empty.jpg": "undecodable",
        "text.png": "undecodable", "labels.csv": "not_image", "tiny.jpg": "undersized",
        "large.png": "too_large", "gone.jpg": "unreadable", "pipe.jpg": "unreadable",
    }  # fmt: skip
    listed = rejects(tmp_path / "out")
    assert listed.pop("1.jpg", listed.pop("copy.jpg", "")) == wanted.pop("copy.jpg")
    assert listed == wanted
    assert dict(manifest.rejected) == {
        "duplicate": 1, "not_image": 1, "too_large": 1, "undecodable": 3, "undersized": 1,
        "unreadable": 2,
    }  # fmt: skip
    assert manifest.num_samples == 40


def test_linked_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    real = write_images(tmp_path / "real", 6)
    source = tmp_path / "in"
    source.mkdir()
    (source / "link").symlink_to(real)
    (real / "loop").symlink_to(source)
    manifest = build(source, dest=tmp_path / "out")
    assert (manifest.num_samples, manifest.rejected) == (6, ())


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 10)
    with (source / "huge.jpg").open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would not end in memory
    build(source, dest=tmp_path / "out")
    assert rejects(tmp_path / "out") == {"huge.jpg": "too_large"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "is empty"),
        (lambda folder: folder.write_text("x"), "is a file of no known kind"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")), "no image among 1"),
    ],
)
def test_unusable_folders_are_one_sentence_and_nothing_is_written(
    tmp_path: Path, make, sentence: str
) -> None:
    make(tmp_path / "in")
    with pytest.raises((DataError, ConfigError), match=sentence) as caught:
        build(tmp_path / "in", dest=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_many_rejects_publish_nothing_and_name_the_list(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 7)
    for number in range(3):
        (source / f"bad{number}.jpg").write_bytes(b"\xff\xd8\xff damaged")
    with pytest.raises(DataError, match=r"3 of 10 images are rejected \(3 undecodable\)"):
        build(source, dest=tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["rejects.jsonl"]
    more = POLICY.model_copy(update={"max_reject_fraction": 0.3})
    assert build(source, dest=tmp_path / "out", data=more).num_samples == 7


def test_shards_inside_their_own_source_are_refused(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 3)
    with pytest.raises(ConfigError, match="inside the source folder"):
        build(source, dest=source / "shards")
    with pytest.raises(ConfigError, match="inside the source folder"):
        build_shards([f"file://{source.name}"], f"{source.name}/x", POLICY, Storage())


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 20), tmp_path / "out"
    build(source, dest=dest)
    before = {path: path.stat().st_ino for path in dest.iterdir()}
    build(source, dest=dest)
    assert {path: path.stat().st_ino for path in dest.iterdir()} == before


def test_a_build_record_nested_too_deeply_only_makes_it_look_again(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 6), tmp_path / "out"
    build(source, dest=dest)
    before = contents(dest)
    (dest / "build.json").write_bytes(b"[" * 100_000)
    build(source, dest=dest)
    assert contents(dest) == before


def test_only_missing_or_damaged_shards_are_written_again(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 20), tmp_path / "out"
    build(source, dest=dest)
    wanted = contents(dest)
    inodes = {path.name: path.stat().st_ino for path in dest.glob("*.tar")}
    (dest / "persons-000001.tar").write_bytes(wanted["persons-000001.tar"][:5000])
    (dest / "persons-000002.tar").unlink()
    (dest / "manifest.json").unlink()
    build(source, dest=dest)
    assert contents(dest) == wanted
    again = {path.name: path.stat().st_ino for path in dest.glob("*.tar")}
    assert again["persons-000000.tar"] == inodes["persons-000000.tar"]


def test_one_changed_byte_in_an_unpublished_shard_is_not_trusted(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 8), tmp_path / "out"
    build(source, dest=dest)
    wanted = contents(dest)
    (dest / "manifest.json").unlink()
    path, rng = dest / "persons-000000.tar", random.Random(0)
    for _ in range(10):
        damaged = bytearray(wanted[path.name])
        damaged[rng.randrange(len(damaged))] ^= 1 + rng.randrange(255)
        path.write_bytes(damaged)
        build(source, dest=dest)
        assert contents(dest) == wanted
        (dest / "manifest.json").unlink()


def test_shards_of_other_images_are_never_replaced(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 20), tmp_path / "out"
    build(source, dest=dest)
    before = contents(dest)
    write_images(source, 1, start=50)
    with pytest.raises(DataError, match="already holds shards of other images"):
        build(source, dest=dest)
    after = {name: data for name, data in contents(dest).items() if not name.startswith("scan/")}
    assert after == before


def test_moved_sources_with_the_same_images_keep_the_shards(tmp_path: Path) -> None:
    source, dest = write_images(tmp_path / "in", 20), tmp_path / "out"
    first = build(source, dest=dest)
    source.rename(tmp_path / "moved")
    assert build(tmp_path / "moved", dest=dest) == first


def build_and_die(source: Path, dest: Path, writes: int) -> None:
    """In a forked process: build, and die by SIGKILL half-way through write number `writes`."""
    left, put = writes, LocalStore.put

    def dying(self: LocalStore, name: str, data: bytes) -> None:
        nonlocal left
        if left == 0:
            with self._aside(name, data):
                os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        put(self, name, data)

    LocalStore.put = dying  # type: ignore[method-assign]
    build(source, dest=dest)


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4, 5])
def test_killed_at_any_write_and_run_again_gives_the_same_bytes(
    tmp_path: Path, writes: int
) -> None:
    source = write_images(tmp_path / "in", 20)
    build(source, dest=tmp_path / "whole")
    dest = tmp_path / "out"
    child = os.fork()
    if child == 0:
        try:
            build_and_die(source, dest, writes)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (dest / "manifest.json").exists()
    finished = {path: path.stat().st_ino for path in dest.glob("persons-*.tar")}
    assert len(finished) <= min(writes, 3)  # two are written at once
    build(source, dest=dest)
    assert contents(dest) == contents(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in finished} == finished


def test_an_interrupted_survey_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools import ingest

    monkeypatch.setattr(ingest, "SLICE", 5)
    source, dest, judged = write_images(tmp_path / "in", 20), tmp_path / "out", []

    def counting(contents: bytes, items: list[Item], policy: Data, keep):
        judged.append(items[0].name)
        if len(judged) == 13:
            raise StorageError("interrupted")
        return judge(contents, items, policy, keep)

    monkeypatch.setattr(ingest, "judge", counting)
    monkeypatch.setattr(ingest, "_num_threads", lambda sources: 1)
    with pytest.raises(StorageError, match="interrupted"):
        build(source, dest=dest)
    judged.clear()
    judged += ["x"] * 13
    build(source, dest=dest)
    assert len(judged) - 13 == 10
    build(source, dest=tmp_path / "whole")
    assert contents(dest) == contents(tmp_path / "whole")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_publishes_nothing_and_keeps_only_whole_shards(
    tmp_path: Path, tiny_disk: Path
) -> None:
    source, dest = write_images(tmp_path / "in", 40), tiny_disk / "out"
    with pytest.raises(StorageError, match=r"persons-00000\d\.tar': no space left") as caught:
        build(source, dest=dest)
    assert "\n" not in str(caught.value)
    build(source, dest=tmp_path / "whole")
    left, whole = contents(dest), contents(tmp_path / "whole")
    assert left
    assert left.items() < whole.items()
    assert "manifest.json" not in left


def test_an_image_that_changes_between_the_two_passes_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.build_shards as stage

    source = write_images(tmp_path / "in", 8)

    def then_change(*args):
        result = check(*args)
        (source / "d1/1.jpg").write_bytes(picture(1000))
        return result

    check = stage.survey
    monkeypatch.setattr(stage, "survey", then_change)
    with pytest.raises(DataError, match=r"'d1/1\.jpg' changed while"):
        build(source, dest=tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_large_shards_are_put_together_in_a_file_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools import shard_writer

    source = write_images(tmp_path / "in", 20)
    small = build(source, dest=tmp_path / "memory")
    monkeypatch.setattr(shard_writer, "IN_MEMORY", 0)
    assert build(source, dest=tmp_path / "file") == small
    assert contents(tmp_path / "file") == contents(tmp_path / "memory")


def test_a_gif_is_not_an_image_and_a_gif_called_jpg_is_a_bad_one() -> None:
    for name, reason in (("a.gif", "not_image"), ("a.JPG", "undecodable")):
        item = Item(name, name, 106, "", None, {})
        (verdict,) = judge(b"GIF89a" + bytes(100), [item], POLICY)
        assert isinstance(verdict, Refused)
        assert verdict.reason == reason
