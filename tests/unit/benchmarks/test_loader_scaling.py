"""The benchmark of what must not grow runs, on little data, and prints its figures."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "bench_loader_scaling.py"


def test_starts_seeks_and_order_are_measured() -> None:
    command = [sys.executable, str(SCRIPT), "--shards", "2", "3", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for words in ("3 shards, 300 samples", "bars: 3.0 s", "epoch 0.99", "10,000,000 samples"):
        assert words in done.stdout
