"""`dpal audit` finds every damaged object of a target cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.storage import LocalStore
from data_tools.target_audit import audit_targets
from dpal.base.errors import EXIT_DONE, DataError
from dpal.base.inputs import Storage
from jobs.audit import run_audit

from tiny import fill_cache, tiny_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe(tmp_path_factory.mktemp("audit"))
    fill_cache(recipe)
    (folder,) = Path(recipe.cache.url).glob("targets-*")
    return folder


def test_a_whole_cache_has_no_finding(whole: Path) -> None:
    assert audit_targets(LocalStore(whole)) == []
    assert run_audit(str(whole.parent), Storage()) == EXIT_DONE


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "ledger", "extra", "header"])
def test_each_damage_is_found_and_named(whole: Path, damage: str) -> None:
    tar = whole / "view-1" / "persons-000001.tar"
    row = whole / "ledger" / "persons-000001.json"
    header = whole / "header.json"
    target = {"ledger": row, "header": header, "extra": whole / "view-0" / "stray.tar"}.get(
        damage, tar
    )
    before = target.read_bytes() if target.exists() else None
    if damage == "flip":
        target.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
    elif damage == "shorten":
        target.write_bytes(before[:-512])
    elif damage == "remove":
        target.unlink()
    elif damage == "extra":
        target.write_bytes(b"stray")
    else:
        target.write_bytes(b"{")
    try:
        names = [finding.name for finding in audit_targets(LocalStore(whole))]
        assert target.relative_to(whole).as_posix() in names
        with pytest.raises(DataError):
            run_audit(str(whole), Storage())
    finally:
        if before is None:
            target.unlink()
        else:
            target.write_bytes(before)


def audited(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    """Names and problems that are found while the JSON object `name` is changed."""
    before = (folder / name).read_bytes()
    plain = json.loads(before)
    change(plain)
    (folder / name).write_text(json.dumps(plain))
    try:
        return [f"{one.name}: {one.problem}" for one in audit_targets(LocalStore(folder))]
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row["series"].pop("view-1"), "it lacks 'view-1'"),
        (lambda row: row["series"].pop("composite-0"), "it lacks 'composite-0'"),
        (lambda row: row.update(shard="persons-000002.tar"), "of shard 'persons-000002.tar'"),
    ],
)
def test_a_row_that_promises_too_little_is_found(
    whole: Path, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    found = audited(whole, "ledger/persons-000001.json", change)
    assert any(one.startswith("ledger/persons-000001.json: ") and told in one for one in found)


def test_a_row_of_other_samples_is_found(whole: Path) -> None:
    found = audited(whole, "ledger/persons-000001.json", lambda row: row.update(keys_digest="0"))
    assert "view-0/persons-000001.tar: it is of other samples" in found


@pytest.mark.parametrize("number", ["low", "high", "patch_mean", "cls_std", "direction"])
def test_a_number_of_the_header_that_changed_is_found(whole: Path, number: str) -> None:
    def change(plain: dict[str, Any]) -> None:
        value = plain[number]
        plain[number] = [*value[:-1], value[-1] * 1.01] if isinstance(value, list) else value + 0.1

    (found,) = audited(whole, "header.json", change)
    assert found.startswith("header.json: it is damaged (its checksum does not match); delete")


def test_a_header_of_before_without_a_checksum_is_whole(whole: Path) -> None:
    assert audited(whole, "header.json", lambda plain: plain.pop("sha256")) == []


def test_a_cache_that_lost_its_header_is_no_heap_of_tars(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = whole / "header.json"
    before = header.read_bytes()
    header.unlink()
    try:
        with pytest.raises(DataError, match="1 of the objects"):
            run_audit(str(whole.parent), Storage())
        assert f"{whole.name}/header.json: missing; run `dpal cache`" in capsys.readouterr().out
    finally:
        header.write_bytes(before)
