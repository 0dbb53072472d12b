"""The benchmark of what must not grow runs, on little data, and prints its figures."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "bench_loader_scaling.py"


def test_starts_seeks_and_order_are_measured() -> None:
    command = [sys.executable, str(SCRIPT), "--shards", "2", "3", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: a bar is not met
    for words in ("3 shards, 300 samples", "epoch 0.99", "10,000,000 samples"):
        assert words in done.stdout
