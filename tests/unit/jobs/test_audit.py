"""`dpal audit`: what lies at a URL is told, every damaged object named with what mends it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.audit import MAX_NAMED, audit_shards
from data_tools.storage import LocalStore, open_store
from dpal.base.errors import EXIT_DATA, EXIT_DONE, DataError
from dpal.base.inputs import Data, Storage
from jobs.__main__ import main
from jobs.audit import run_audit
from jobs.build_shards import build_shards

from tiny import fill_cache, tiny_recipe

POLICY = Data(images=("unused",), samples_per_shard=6)


def picture(seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for seed in range(20):
        (tmp_path / "in" / f"{seed}.jpg").write_bytes(picture(seed))
    build_shards([str(tmp_path / "in")], str(tmp_path / "out"), POLICY, Storage())
    return tmp_path / "out"


def write_tar(path: Path, *members: tuple[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_findings_come_in_the_order_of_the_manifest_and_say_what_mends(shards: Path) -> None:
    for number in (3, 0, 2):
        flip(shards / f"persons-00000{number}.tar", 700)
    found = audit_shards(LocalStore(shards))
    assert [finding.name for finding in found] == [f"persons-00000{n}.tar" for n in (0, 2, 3)]
    assert "5 of its 6 images are sound" in found[0].problem
    assert all("run `dpal shard` again" in finding.mend for finding in found)


def test_exit_code_is_3_with_a_finding_and_0_without(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(shards)]) == EXIT_DONE
    assert "shards, 20 samples in 4 shards" in capsys.readouterr().out
    (shards / "persons-000001.tar").unlink()
    assert main(["audit", str(shards)]) == EXIT_DATA
    seen = capsys.readouterr()
    assert seen.out == "persons-000001.tar: missing; run `dpal shard` again\n"
    assert "1 of the objects" in seen.err
    assert "Traceback" not in seen.err


def test_json_tells_the_same(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(shards), "--json"]) == EXIT_DONE
    told = json.loads(capsys.readouterr().out)
    assert [(one["kind"], one["findings"]) for one in told["data_sets"]] == [("shards", [])]
    flip(shards / "persons-000002.tar", 700)
    assert main(["audit", "--json", str(shards)]) == EXIT_DATA
    (finding,) = json.loads(capsys.readouterr().out)["data_sets"][0]["findings"]
    assert finding["name"] == "persons-000002.tar"
    assert "checksum" in finding["problem"]
    assert finding["mend"]


def test_data_sets_below_a_run_folder_are_found(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    shards.rename(run / "shards")
    build_shards([str(tmp_path / "in")], str(run / "shards" / "backgrounds"), POLICY, Storage())
    for url in (run, run / "shards", tmp_path / "runs"):
        assert run_audit(str(url), Storage()) == EXIT_DONE
    flip(run / "shards" / "backgrounds" / "persons-000000.tar", 700)
    for url in (run, run / "shards", tmp_path / "runs"):
        with pytest.raises(DataError, match="1 of the objects"):
            run_audit(str(url), Storage())


def test_a_cache_beside_the_shards_is_none_of_their_extras(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its objects used to be listed as those that may be deleted."""
    recipe = tiny_recipe(tmp_path)
    url = recipe.data.shards
    fill_cache(recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"url": url})}))
    assert run_audit(url, Storage()) == EXIT_DONE
    assert "(2 data sets)" in capsys.readouterr().out
    for header in Path(url).glob("targets-*/header.json"):
        header.unlink()
    with pytest.raises(DataError, match="of the objects"):
        run_audit(url, Storage())


def test_tars_of_another_program_are_said_to_be_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        images = [(f"{number}{row:03d}", picture(row)) for row in range(4)]
        members = [m for key, data in images for m in ((f"{key}.jpg", data), (f"{key}.cls", b"1"))]
        write_tar(tmp_path / f"shard-{number}.tar", *members)
    write_tar(tmp_path / "text" / "t.tar", ("a.txt", b"no image"))
    assert run_audit(str(tmp_path), Storage()) == EXIT_DONE
    told = capsys.readouterr().out
    assert "tars without a manifest, 3 tars with 12 images in 24 files;" in told
    assert "text: tars without a manifest, 1 tars with 0 images in 1 files" in told


def test_damage_in_foreign_tars_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "good.tar", ("a.jpg", picture(1)))
    write_tar(tmp_path / "image.tar", ("a.jpg", picture(1)), ("b.jpg", b"GIF89a" + bytes(90)))
    write_tar(tmp_path / "climbs.tar", ("../a.jpg", picture(1)))
    write_tar(tmp_path / "cut.tar", ("a.jpg", bytes(9000)))
    cut = (tmp_path / "cut.tar").read_bytes()[:5000]
    (tmp_path / "cut.tar").write_bytes(cut)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert main(["audit", str(tmp_path), "--json"]) == EXIT_DATA
    (told,) = json.loads(capsys.readouterr().out)["data_sets"]
    names = [finding["name"] for finding in told["findings"]]
    assert names == ["cut.tar", "empty.tar", "image.tar#b.jpg"]
    assert all(finding["mend"] for finding in told["findings"])
    assert "1 passed over (name that is no relative path)" in told["detail"]


def test_names_that_are_no_text_or_steer_a_terminal_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a\x1b[2J.jpg", "b\udcff.jpg", "c\n.jpg")):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"GIF"))
    assert main(["audit", str(tmp_path)]) == EXIT_DATA
    lines = capsys.readouterr().out.encode("ascii").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(b"0.tar#a\\x1b[2J.jpg: ")
    assert main(["audit", str(tmp_path), "--json"]) == EXIT_DATA
    json.loads(capsys.readouterr().out)


def test_undecodable_images_are_found_when_asked_for(tmp_path: Path) -> None:
    cut = picture(1)[:900]
    write_tar(tmp_path / "t.tar", ("a.jpg", picture(1)), ("b.jpg", cut), ("c.jpg", cut))
    assert run_audit(str(tmp_path), Storage()) == EXIT_DONE
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(str(tmp_path), Storage(), decode=True)


def test_images_of_a_manifest_are_decoded_when_asked_for(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools import audit
    from data_tools.shard import Shard

    assert audit_shards(LocalStore(shards), decode=True) == []
    monkeypatch.setattr(Shard, "image_bytes", lambda self, row: b"\xff\xd8\xff")
    assert audit_shards(LocalStore(shards)) == []
    found = audit_shards(LocalStore(shards), decode=True)
    assert len(found) == 20
    assert all("#" in finding.name for finding in found)
    monkeypatch.setattr(audit, "MAX_NAMED", 2)
    found = audit_shards(LocalStore(shards), decode=True)
    assert len(found) == 3 * (2 + 1) + 2  # the last shard has two
    assert found[2].problem == "4 more of its samples are damaged"
    assert MAX_NAMED > 2


def test_an_unfinished_sharding_is_told_from_foreign_tars(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "manifest.json").unlink()
    (shards / "scan").mkdir(exist_ok=True)
    (shards / "scan" / "0.json").write_text("{}")
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(str(shards), Storage())
    assert "has not published its manifest; run `dpal shard` again" in capsys.readouterr().out


def test_a_remote_store_is_audited_like_a_folder(shards: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-audit"
    store = open_store(url, Storage())
    for path in shards.iterdir():
        if path.is_file():
            store.put(path.name, path.read_bytes())
    assert run_audit(url, Storage()) == EXIT_DONE
    store.put("persons-000003.tar", b"short")
    with pytest.raises(DataError, match="1 of the objects"):
        run_audit(url, Storage(), decode=True)
    store.delete("manifest.json")
    with pytest.raises(DataError, match=r"of the objects"):
        run_audit(url, Storage())


def test_progress_has_an_estimate(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpal.base.progress import Progress

    monkeypatch.setattr(Progress, "PLAIN_SECONDS", 0.0)
    audit_shards(LocalStore(shards))
    lines = capsys.readouterr().err.splitlines()
    assert any("audit: 2/4 shards" in line and "s left" in line for line in lines)
