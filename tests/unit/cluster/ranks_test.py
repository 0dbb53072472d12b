"""`spawn_ranks`: environment, exit codes, forwarded signals, no rank left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.ranks import spawn_ranks, worst
from dpal.base.errors import ConfigError

GRACEFUL = (
    "import os, pathlib, signal, sys, time\n"
    "signal.signal(signal.{number}, lambda *_: sys.exit({code}))\n"
    "pathlib.Path('up-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
    "time.sleep(60)\n"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    """True while `pid` runs; a zombie that waits for its reaper counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_every_rank_gets_its_place_in_the_world(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT EXTRA"
    code = (
        "import os, pathlib\n"
        f"row = [os.environ[name] for name in {names!r}.split()]\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(row))\n"
    )
    assert spawn_ranks(python(code), 3, {"EXTRA": "yes"}) == 0
    rows = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "1"], ["2", "2"]]
    assert {tuple(row[2:5]) for row in rows} == {("3", "3", "127.0.0.1")}
    assert len({row[5] for row in rows}) == 1
    assert {row[6] for row in rows} == {"yes"}


def test_the_second_of_two_nodes_goes_on_counting(tmp_path: Path) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    code = (
        "import os, pathlib\n"
        f"row = [os.environ[name] for name in {names!r}.split()]\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(row))\n"
    )
    place = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "2950"}
    assert spawn_ranks(python(code), 2, place) == 0
    rows = [(tmp_path / str(rank)).read_text() for rank in (2, 3)]
    assert rows == ["2 0 4 2 first 2950", "3 1 4 2 first 2950"]
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        spawn_ranks(python(code), 2, {"NUM_NODES": "2", "NODE_RANK": "1"})


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 75), 75), ((75, 3), 3), ((0, -9), 1), ((4, 75), 4), ((75, 75), 75)],
)
def test_errors_come_before_run_again_before_done(codes: tuple[int, ...], expected: int) -> None:
    assert worst(codes) == expected
    program = f"import os, sys; code = {codes}[int(os.environ['RANK'])]\n"
    program += "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    # A rank that asks to be run again is not an error: the other rank still ends by itself.
    program = (
        f"import os, time; time.sleep(.3 * ({codes}[int(os.environ['RANK'])] == 4))\n{program}"
    )
    assert spawn_ranks(python(program), 2) == expected


def test_a_rank_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(.3)\n"
        "sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    start = time.monotonic()
    assert spawn_ranks(python(code), 2) == 3
    assert time.monotonic() - start < 15
    assert not alive(int((tmp_path / "0").read_text()))


def test_a_rank_that_ignores_the_end_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"mine = pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])\n"
        "mine.write_text(str(os.getpid()))\n"
        "while not mine.with_name('0').exists(): time.sleep(.02)\n"
        "sys.exit(2) if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    assert spawn_ranks(python(code), 2, grace_s=0.3) == 2
    assert not alive(int((tmp_path / "0").read_text()))


def launcher(folder: Path, rank_code: str) -> subprocess.Popen[bytes]:
    code = "import sys; from cluster.ranks import spawn_ranks\n"
    code += f"sys.exit(spawn_ranks({python(rank_code)!r}, 2))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(python(code), cwd=folder, env=environment)
    wait_for(lambda: (folder / "up-0").exists() and (folder / "up-1").exists())
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_signals_reach_every_rank_and_75_comes_back(tmp_path: Path, number) -> None:
    process = launcher(tmp_path, GRACEFUL.format(number=number.name, code=75))
    process.send_signal(number)
    assert process.wait(10) == 75


def test_a_stop_before_a_rank_listens_means_run_again(tmp_path: Path) -> None:
    process = launcher(tmp_path, GRACEFUL.format(number="SIGUSR2", code=75))
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    process = launcher(tmp_path, GRACEFUL.format(number="SIGTERM", code=75))
    pids = [int((tmp_path / f"up-{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids))
