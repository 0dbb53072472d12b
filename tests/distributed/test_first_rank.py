"""What rank 0 does for all: the others wait for it, and end quietly with it when it fails."""

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys, time
from dpal.base.errors import DataError, DpalError
from dpal.first_rank import by_rank_0
from dpal.ranks import World, lost_peers_told

def work():
    time.sleep(3)
    print("looked", flush=True)
    if sys.argv[1] == "fails":
        raise DataError("the cache is of something else")

world = World.from_environment()
try:
    with lost_peers_told(world):
        by_rank_0(world, work)
    print("went on", flush=True)
except DpalError as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
"""
LAUNCH = """
import sys
from cluster.ranks import spawn_ranks
sys.exit(spawn_ranks([sys.executable, *sys.argv[1:]], 2))
"""


@pytest.mark.parametrize("how", ["passes", "fails"])
def test_ranks_wait_for_the_first_and_end_with_it(tmp_path: Path, how: str) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    argv = [sys.executable, "-c", LAUNCH, str(tmp_path / "rank.py"), how]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    lines = done.stdout.split("\n")
    assert lines[0] == "looked"
    if how == "passes":
        assert done.returncode == 0, done.stderr
        assert lines[1:3] == ["went on"] * 2
        return
    assert done.returncode == 3
    assert "went on" not in lines
    assert sorted(done.stderr.strip().splitlines()) == [
        "rank 1 ends because rank 0 does; that rank tells why",
        "the cache is of something else",
    ]
