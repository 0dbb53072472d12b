import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpal.base.errors import StorageError
from jobs.publish import new_folder, read_record, write_text

KILLED = """
import os, signal
from pathlib import Path
from jobs.publish import new_folder
with new_folder(Path({target!r})) as aside:
    (aside / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_replaces_the_old_one_as_a_whole(tmp_path: Path):
    target = tmp_path / "export"
    for word in ("first", "second"):
        with new_folder(target) as aside:
            assert aside.parent == tmp_path
            (aside / word).write_text(word)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_error_leaves_the_old_folder(tmp_path: Path):
    target = tmp_path / "export"
    with new_folder(target) as aside:
        (aside / "kept").write_text("x")
    with pytest.raises(ZeroDivisionError), new_folder(target) as aside:
        (aside / "new").write_text(str(1 / 0))
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert list(tmp_path.iterdir()) == [target]


def test_leftover_of_a_killed_process_is_never_published_and_removed_by_the_next(tmp_path: Path):
    target = tmp_path / "export"
    script = KILLED.format(target=str(target))
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(tmp_path.glob(".export.*"))) == 1
    with new_folder(target) as aside:
        (aside / "whole").write_text("x")
    assert list(tmp_path.iterdir()) == [target]


def test_folder_of_a_process_that_still_runs_is_left_alone(tmp_path: Path):
    working = tmp_path / f".export.new.{os.getppid()}"
    working.mkdir()
    with new_folder(tmp_path / "export"):
        pass
    assert working.is_dir()


def test_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="export"), new_folder(tmp_path / "file" / "export"):
        pass


def test_a_text_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "table.md"
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*table\.md"):
        write_text(path, "third")
    assert list(path.parent.iterdir()) == [path]


def test_a_record_that_is_damaged_or_not_there_says_nothing(tmp_path: Path):
    file = tmp_path / "note.json"
    assert read_record(file) == {}
    for damaged in (b'{"digest": ', b"[1, 2]", b"\xff\xfe"):
        file.write_bytes(damaged)
        assert read_record(file) == {}
    write_text(file, '{"digest": "ab"}')
    assert read_record(file) == {"digest": "ab"}
