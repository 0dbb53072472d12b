"""The event log: whole rows only, also after a full disk and a restart."""

import json
from pathlib import Path

import pytest

from dpal.base.errors import StorageError
from dpal.trainer import EventLog


def write_rows(log: EventLog) -> None:
    for step in range(2, 100):
        log.write("step", step, note="x" * 1000)


def test_a_full_disk_is_a_storage_error_and_the_next_start_drops_the_torn_row(
    small_disk: Path,
) -> None:
    ballast, path = small_disk / "ballast", small_disk / "run" / "events.jsonl"
    log = EventLog(path, enabled=True)
    log.write("step", 1, note="x" * 100)
    with pytest.raises(OSError, match="No space"), ballast.open("wb") as file:
        file.write(bytes(16 * 2**20))
    with pytest.raises(StorageError, match=r"cannot write '.*events.jsonl': No space left"):
        write_rows(log)
    log.close()
    torn = path.read_bytes()
    assert not torn.endswith(b"\n"), "this test needs a row that was cut short"
    ballast.unlink()

    again = EventLog(path, enabled=True)
    again.write("start", 1)
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, len(rows)), 1]
    assert rows[-1]["event"] == "start"


def test_a_restart_appends_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in (1, 2):
        log = EventLog(path, enabled=True)
        log.write("step", step, loss=0.5)
        log.close()
    other = EventLog(path, enabled=False)
    other.write("step", 3)
    other.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 0.5)]


def test_a_log_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        EventLog(tmp_path / "events.jsonl", enabled=True)
