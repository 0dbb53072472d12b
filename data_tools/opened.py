"""Values that are opened ahead of their use by a few threads: shards, and their targets."""

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

OPENING = 8  # shards that are opened, or fetched, at a time


class Opened(Generic[K, V]):
    """A thread-safe cache of the most recently used values; each is made once, in the background.

    Args:
        size: values that are kept.
        make: opens one; what it raises is raised by `get`.
        threads: that many are made at a time.
    """

    def __init__(self, size: int, make: Callable[[K], V], threads: int) -> None:
        self._size, self._make = size, make
        self._values: OrderedDict[K, Future[V]] = OrderedDict()
        self._made: dict[K, V] = {}  # read without a lock
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="open")

    def request(self, key: K) -> None:
        """Have the value made, if it is not there; does not wait."""
        self._future(key)

    def get(self, key: K) -> V:
        """The value, as soon as it is made; only `request` tells that it was used."""
        try:
            return self._made[key]
        except KeyError:
            value = self._future(key).result()
        with self._lock:
            if key in self._values:
                self._made[key] = value
        return value

    def forget_waiting(self) -> None:
        """Take back the requests that no thread has begun with."""
        with self._lock:
            for key in [key for key, value in self._values.items() if value.cancel()]:
                del self._values[key]

    def _future(self, key: K) -> Future[V]:
        with self._lock:
            future = self._values.get(key)
            if future is None:
                future = self._values[key] = self._pool.submit(self._make, key)
                if len(self._values) > self._size:
                    self._made.pop(self._values.popitem(last=False)[0], None)
            else:
                self._values.move_to_end(key)
            return future


def allow_open_files() -> None:
    """Let this process open as many files as it may: every open shard holds one."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # where the kernel's own limit is lower still
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
