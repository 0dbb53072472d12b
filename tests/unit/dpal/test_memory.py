"""Freed memory stays in the process, seen by the page faults of taking it again."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from dpal.base.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported"); sys.exit()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():  # a few large tensors, alive together and freed together
    return [torch.ones(size << 20) for size in (16, 12, 20, 16)]
step(), step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "unsupported":
        pytest.skip("the C library is not glibc")
    return int(done.stdout)


def test_large_blocks_taken_again_cost_few_page_faults() -> None:
    assert page_faults("keep") * 6 < page_faults("default")
