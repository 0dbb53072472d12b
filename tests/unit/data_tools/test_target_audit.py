"""`dpal audit` finds every damaged object of a target cache."""

from pathlib import Path

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
