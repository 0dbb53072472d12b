"""Start the ranks of one node as plain processes and answer for all of them with one exit code."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from dpal.base.errors import EXIT_BUG, EXIT_DONE, EXIT_RUN_AGAIN, ConfigError

GRACE_SECONDS = 20.0
POLL_SECONDS = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

Ranks = Sequence[subprocess.Popen[bytes]]


def spawn_ranks(
    argv: Sequence[str],
    processes: int,
    env: Mapping[str, str] | None = None,
    *,
    grace_s: float = GRACE_SECONDS,
) -> int:
    """Run `argv` as `processes` ranks of one node and return the worst exit code.

    Every rank gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. It
    leads a session of its own, so a Ctrl-C reaches it once: SIGTERM, SIGINT and SIGUSR1 are passed
    on from here. A rank that ends with a code other than 0 and 75 takes the others with it:
    SIGTERM, then SIGKILL after the grace. Its code is the answer (a death by a signal is 1, by the
    very signal that was passed on 75); else 75 if a rank asks for it; else 0.

    One node of several is told so by NUM_NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in its
    environment (see `num_nodes`); a single node meets on a free port of the loopback interface.

    Args:
        argv: program and arguments, no shell.
        processes: number of ranks on this node, at least 1.
        env: variables added to those of this process.
        grace_s: seconds between SIGTERM and SIGKILL.

    Raises:
        ConfigError: NUM_NODES says that there are others, but not where they meet.
    """
    assert processes >= 1, "a node runs at least one rank"
    given = {**os.environ, **(env or {})}
    shared = {**given, **_rendezvous(processes, given)}
    first = processes * int(given.get("NODE_RANK", "0")) if num_nodes(given) > 1 else 0
    ranks: list[subprocess.Popen[bytes]] = []
    with _recorded_signals() as received:
        try:
            for rank in range(processes):
                numbers = {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
                ranks.append(_start(argv, {**shared, **numbers}))
            return _wait(ranks, received)
        finally:
            _end(ranks, grace_s)


def worst(codes: Sequence[int]) -> int:
    """One exit code for many processes: the first error, else 75 if any, else 0."""
    for code in codes:
        if code not in (EXIT_DONE, EXIT_RUN_AGAIN):
            return code if code > 0 else EXIT_BUG
    return EXIT_RUN_AGAIN if EXIT_RUN_AGAIN in codes else EXIT_DONE


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def num_nodes(env: Mapping[str, str] | None = None) -> int:
    """Number of nodes of this job: NUM_NODES in the environment, 1 without it."""
    return int((os.environ if env is None else env).get("NUM_NODES", "1"))


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Collect the stop signals of this process in a list instead of dying from them."""
    received: list[int] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in FORWARDED:
            previous[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rendezvous(processes: int, given: Mapping[str, str]) -> dict[str, str]:
    nodes = num_nodes(given)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if nodes > 1:
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in given:
                raise ConfigError(f"NUM_NODES={nodes} is set without {name}; set both or none")
        place = {name: given[name] for name in place}
    sizes = {"WORLD_SIZE": str(nodes * processes), "LOCAL_WORLD_SIZE": str(processes)}
    return {**sizes, **place}


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv, env=dict(env), start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL)
    )


def die_with_parent(number: int) -> Callable[[], None] | None:
    """A `preexec_fn` that has the kernel send `number` to the child when its parent is killed.

    Without it the ranks of a killed launcher go on, and a second run writes beside them. Only
    Linux has this (prctl PR_SET_PDEATHSIG), and only the main thread lives long enough.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    libc = ctypes.CDLL(None)

    def set_signal() -> None:
        libc.prctl(1, int(number), 0, 0, 0)

    return set_signal


def _wait(ranks: Ranks, received: list[int]) -> int:
    """Wait until all ranks ended well or one did not; pass signals on meanwhile."""
    ended: list[int] = []  # codes in the order of death: the first error is the cause
    passed_on = 0
    running = list(ranks)
    while running:
        for number in received[passed_on:]:
            passed_on += 1
            for rank in running:
                rank.send_signal(number)
        ended += [code for rank in running if (code := rank.poll()) is not None]
        running = [rank for rank in running if rank.returncode is None]
        # Killed by the stop signal itself: the rank was asked before it could install a handler.
        answers = [EXIT_RUN_AGAIN if -code in received else code for code in ended]
        if any(code not in (EXIT_DONE, EXIT_RUN_AGAIN) for code in ended):
            return worst(answers)
        if running:
            time.sleep(POLL_SECONDS)
    return worst(ended)


def _end(ranks: Ranks, grace_s: float) -> None:
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for rank in running:
        try:
            rank.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)  # its session: data workers go with it
            rank.wait()
