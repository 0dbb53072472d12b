"""Keep freed memory in the process: large tensors are then not mapped and cleared anew each step.

glibc gives every block above 32 MB back to the kernel when it is freed; the next one costs a page
fault per 4 KB. A training step on a CPU frees and takes gigabytes (docs/performance.md).
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_GROWTH = 64 * 2**20  # bytes the heap grows by at least


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; True where the C library allows it (glibc).

    The process then stays as large as it has been at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _GROWTH))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
