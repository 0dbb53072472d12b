"""`dpal audit --unused`: what no recipe refers to is listed, and deleted only when asked."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from data_tools.dated import dated_listing
from data_tools.feature_cache import finished_shards
from data_tools.storage import LocalStore, ObjectStore, open_store
from data_tools.target_audit import audit_targets
from data_tools.unused import ORPHAN_S, cache_folders, delete_cache
from dpal.base.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE
from dpal.base.inputs import Storage
from dpal.base.recipe import Recipe

from command import call
from tiny import fill_cache, tiny_recipe, write_persons, write_recipe


def with_codec(recipe: Recipe, codec: str) -> Recipe:
    return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"codec": codec})})


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("unused")
    write_persons(folder / "persons", 16)
    recipe = tiny_recipe(folder)
    for codec in ("int8", "fp16"):
        fill_cache(with_codec(recipe, codec))
    return recipe


@pytest.fixture
def recipe(made: Recipe, tmp_path: Path) -> Recipe:
    """Two caches of its own: one under int8, which the recipe asks for, one under fp16."""
    url = tmp_path / "targets"
    shutil.copytree(made.cache.url, url)
    return made.model_copy(update={"cache": made.cache.model_copy(update={"url": str(url)})})


def folder_of(recipe: Recipe, codec: str) -> Path:
    for folder in Path(recipe.cache.url).glob("targets-*"):
        if json.loads((folder / "header.json").read_text())["definition"]["codec"] == codec:
            return folder
    raise AssertionError(codec)


def test_unused_caches_are_listed_with_bytes_and_age_and_stay(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used, unused = folder_of(recipe, "int8"), folder_of(recipe, "fp16")
    for path in unused.rglob("*"):
        os.utime(path, (time.time() - 5 * 86400,) * 2)
    (Path(recipe.cache.url) / "notes.txt").write_text("not a cache")
    before = digests(Path(recipe.cache.url))
    file = write_recipe(recipe, tmp_path / "one.yaml")
    told = call(capsys, "audit", "--unused", recipe.cache.url, "--recipes", file)
    assert told.code == EXIT_DONE
    assert f"{used.name}: used by {file}, " in told.printed
    size = sum(path.stat().st_size for path in unused.rglob("*") if path.is_file())
    assert f"{unused.name}: unused, {size / 1e6:.1f} MB in " in told.printed
    assert "last written 5.0 days ago" in told.printed
    assert f"1 of 2 caches, {size / 1e6:.1f} MB: may go" in told.printed
    told = call(capsys, "audit", "--unused", recipe.cache.url, "--json", "--recipes", file)
    rows = {row["folder"]: row for row in json.loads(told.printed)["caches"]}
    assert (rows[used.name]["used_by"], rows[unused.name]["used_by"]) == ([str(file)], [])
    assert rows[unused.name]["bytes"] == size
    assert digests(Path(recipe.cache.url)) == before


def test_only_unused_caches_are_deleted_and_wholly(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used, unused = folder_of(recipe, "int8"), folder_of(recipe, "fp16")
    before = digests(used)
    (unused / "view-0" / f".x.dpal-tmp-{os.uname().nodename}-4000000-ab").write_text("killed")
    file = write_recipe(recipe, tmp_path / "one.yaml")
    words = ("audit", "--unused", recipe.cache.url, "--recipes", file, "--delete")
    told = call(capsys, *words)
    assert told.code == EXIT_DONE
    assert ": deleted" in told.printed
    assert not unused.exists()
    assert digests(used) == before
    assert "0 of 1 caches" in call(capsys, *words).printed


def test_every_given_recipe_keeps_its_cache(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_recipe(recipe, tmp_path / "one.yaml")
    two = write_recipe(with_codec(recipe, "fp16"), tmp_path / "two.yaml")
    words = ("audit", "--unused", recipe.cache.url, "--delete", "--recipes", one, two)
    assert "0 of 2 caches" in call(capsys, *words).printed
    assert folder_of(recipe, "int8") != folder_of(recipe, "fp16")


def test_nothing_goes_when_what_a_recipe_needs_cannot_be_told(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(Path(recipe.cache.url))
    good = write_recipe(recipe, tmp_path / "good.yaml")
    teacher = recipe.teacher.model_copy(update={"weights": str(tmp_path / "gone.safetensors")})
    lost = write_recipe(recipe.model_copy(update={"teacher": teacher}), tmp_path / "lost.yaml")
    words = ("audit", "--unused", recipe.cache.url, "--delete")
    answer = call(capsys, *words, "--recipes", good, lost)
    assert answer.code in (EXIT_CONFIG, EXIT_DATA)
    assert answer.sentence.startswith(f"{lost}: ")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\n")
    answer = call(capsys, *words, "--recipes", good, bad)
    assert answer.code == EXIT_CONFIG
    assert answer.sentence.startswith(f"{bad}: ")
    answer = call(capsys, *words)
    assert answer.code == EXIT_CONFIG
    assert "--recipes" in answer.sentence
    url = {"url": str(tmp_path / "elsewhere")}
    away = recipe.model_copy(update={"cache": recipe.cache.model_copy(update=url)})
    answer = call(capsys, *words, "--recipes", write_recipe(away, tmp_path / "away.yaml"))
    assert answer.code == EXIT_CONFIG
    assert "none of the recipes keeps its targets in" in answer.sentence
    assert call(capsys, "audit", recipe.cache.url, "--delete").code == EXIT_CONFIG
    answer = call(capsys, "audit", "--unused", str(tmp_path / "no"), "--recipes", good)
    assert answer.code == EXIT_DATA
    assert digests(Path(recipe.cache.url)) == before


class Killed(Exception):
    """In the middle of deleting."""


class DyingStore(LocalStore):
    """Dies at a deletion."""

    def __init__(self, root: Path, lives: int) -> None:
        super().__init__(root)
        self.lives = lives

    def delete(self, name: str) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        super().delete(name)


@pytest.mark.parametrize("deleted", [1, 2, 3, 5, 7, 9, 10])
def test_a_killed_delete_leaves_a_cache_that_knows_what_it_lacks(
    recipe: Recipe, deleted: int
) -> None:
    folder = folder_of(recipe, "int8")
    before = digests(folder)
    assert len(before) == 3 + 2 * (1 + 3)  # header, covariance, software; two shards
    with pytest.raises(Killed):
        delete_cache(DyingStore(folder, deleted), sorted(before))
    for name in finished_shards(LocalStore(folder)):
        for series in ("view-0", "view-1", "composite-0"):
            assert (folder / series / name).exists(), "a row promises its tars"
    fill_cache(recipe)
    assert digests(folder) == before
    assert audit_targets(LocalStore(folder)) == []


def test_tars_without_a_row_go_when_they_are_a_day_old(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(recipe, "int8")
    old, young, row = (
        folder / "view-0" / "persons-000000.tar",
        folder / "view-1" / "persons-000000.tar",
        folder / "ledger" / "persons-000000.json",
    )
    row.unlink()
    os.utime(old, (time.time() - ORPHAN_S - 60,) * 2)
    file = write_recipe(recipe, tmp_path / "one.yaml")
    words = ("audit", "--unused", recipe.cache.url, "--recipes", file)
    assert "1 tars without a ledger row" in call(capsys, *words).printed
    assert old.exists()
    call(capsys, *words, "--delete")
    assert not old.exists()
    assert young.exists()
    assert (folder / "view-0" / "persons-000001.tar").exists()


def test_a_remote_store_is_cleared_like_a_folder(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"memory://{tmp_path.name}-unused"
    store: ObjectStore = open_store(url, Storage())
    for name in digests(Path(recipe.cache.url)):
        store.put(name, (Path(recipe.cache.url) / name).read_bytes())
    listing = dated_listing(url, Storage())
    assert [entry.name for entry in listing] == store.list()
    assert all(abs(entry.written - time.time()) < 600 for entry in listing)
    assert len(cache_folders(listing, time.time())) == 2
    remote = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"url": url})})
    file = write_recipe(remote, tmp_path / "one.yaml")
    told = call(capsys, "audit", "--unused", url, "--delete", "--recipes", file)
    assert "1 of 2 caches" in told.printed
    kept = folder_of(recipe, "int8").name
    assert {name.split("/")[0] for name in store.list()} == {kept}
