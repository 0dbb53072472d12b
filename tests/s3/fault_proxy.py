"""An HTTP proxy in front of the S3 server that spoils chosen answers.

The request is passed on as it came, `Host` included, so its signature stays valid. What happens
to an answer is decided, request by request, by a `Schedule`: a function from the number of the
request and its target to a `Fault`. Every request is recorded.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import pytest

from seaweed import S3Server

Kind = Literal[
    "none",
    "500",
    "503",  # SlowDown, with Retry-After when `seconds` is positive
    "truncate",  # the connection is closed after the share `amount` of the body
    "stall",  # after the share `amount` of the body nothing comes any more, for `seconds`
    "trickle",  # the body comes a byte at a time, `seconds` apart
    "reset before",  # the connection is reset instead of an answer
    "reset after",  # the connection is reset behind the headers
    "flip",  # one bit of the byte at the share `amount` of the body is another one
    "delay",  # the answer comes `seconds` later
]
KINDS: tuple[Kind, ...] = (
    "500",
    "503",
    "truncate",
    "stall",
    "trickle",
    "reset before",
    "reset after",
    "flip",
    "delay",
)


class Fault(NamedTuple):
    """What is done to one answer; the kinds say what `amount` and `seconds` mean."""

    kind: Kind = "none"
    amount: float = 0.5
    seconds: float = 0.0


class Request(NamedTuple):
    """One request that reached the proxy: its method, its path, and what was done to it."""

    method: str
    path: str
    fault: Fault


Schedule = Callable[[int, str, str], Fault]
"""From the request's number since the schedule was set, its method and its path."""


def no_faults(_number: int, _method: str, _path: str) -> Fault:
    """The schedule that leaves every answer as it is."""
    return Fault()


class FaultProxy:
    """A proxy that runs in a thread of its own.

    Attributes:
        endpoint: where it listens.
        requests: everything that was asked since the schedule was set.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._schedule: Schedule = no_faults
        self.requests: list[Request] = []
        self.endpoint = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def set(self, schedule: Schedule) -> None:
        """Spoil answers by another schedule from now on; forget what was asked before."""
        self._schedule, self.requests = schedule, []

    @contextmanager
    def running(self) -> Iterator["FaultProxy"]:
        """Listen on a free port of this machine until the block ends."""
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        self.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(_end(server), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the proxy ends
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection stays open."""
        head = await reader.readuntil(b"\r\n\r\n")
        if b"expect" in _fields(head):  # the body of a PUT comes only when it is asked for
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, head, to_the_end=False)
        method, path = head.split(b" ", 2)[:2]
        asked = (method.decode(), path.decode().partition("?")[0])
        fault = self._schedule(len(self.requests), *asked)
        self.requests.append(Request(*asked, fault))
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        if fault.kind == "reset before":
            _reset(writer)
            return False
        if fault.kind in ("500", "503"):
            return await _refuse(writer, fault)
        answer_head, answer = await self._ask(head, body)
        return await _answer(writer, answer_head, answer, fault)

    async def _ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection(*self._upstream, limit=2**26)
        try:
            writer.write(_closing(head) + body)
            await writer.drain()
            answer_head = await reader.readuntil(b"\r\n\r\n")
            empty = head.startswith(b"HEAD") or answer_head.split(b" ", 2)[1] in (b"204", b"304")
            answer = b"" if empty else await _body(reader, answer_head, to_the_end=True)
            return answer_head, answer
        finally:
            writer.close()


async def _end(server: asyncio.Server) -> None:
    """Stop listening, and let go of the connections that are still open."""
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _body(reader: asyncio.StreamReader, head: bytes, *, to_the_end: bool) -> bytes:
    """A body as it came: by its length, in chunks, or (an answer's) until the end."""
    fields = _fields(head)
    if b"content-length" in fields:
        return await reader.readexactly(int(fields[b"content-length"]))
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = b""
        while True:
            size = await reader.readuntil(b"\r\n")
            length = int(size.split(b";")[0], 16)
            body += size + await reader.readexactly(length + 2)
            if length == 0:
                return body
    return await reader.read() if to_the_end else b""


def _fields(head: bytes) -> dict[bytes, bytes]:
    lines = [line.partition(b":") for line in head.split(b"\r\n")[1:] if line]
    return {name.strip().lower(): value.strip() for name, _colon, value in lines}


def _closing(head: bytes) -> bytes:
    """The head with `Connection: close` (never signed), so that the answer has an end."""
    lines = [line for line in head[:-4].split(b"\r\n") if not _is_hop(line)]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n"


def _is_hop(line: bytes) -> bool:
    name = line.partition(b":")[0].lower()
    return name in (b"connection", b"keep-alive", b"expect")


async def _answer(writer: asyncio.StreamWriter, head: bytes, body: bytes, fault: Fault) -> bool:
    lines = [line for line in head[:-4].split(b"\r\n") if not _is_hop(line)]
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    cut = int(len(body) * fault.amount)
    if fault.kind == "flip" and body:
        at = min(cut, len(body) - 1)
        body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    if fault.kind == "reset after":
        writer.write(head)
        await writer.drain()
        _reset(writer)
        return False
    if fault.kind in ("truncate", "stall"):
        writer.write(head + body[:cut])
        await writer.drain()
        await asyncio.sleep(fault.seconds if fault.kind == "stall" else 0)
        return False
    if fault.kind == "trickle":
        writer.write(head)
        for at in range(len(body)):
            writer.write(body[at : at + 1])
            await writer.drain()
            await asyncio.sleep(fault.seconds)
    else:
        writer.write(head + body)
    await writer.drain()
    return True


async def _refuse(writer: asyncio.StreamWriter, fault: Fault) -> bool:
    code = {"500": "InternalError", "503": "SlowDown"}[fault.kind]
    body = f"<Error><Code>{code}</Code><Message>so it was planned</Message></Error>".encode()
    wait = f"Retry-After: {int(fault.seconds)}\r\n" if fault.seconds else ""
    head = f"HTTP/1.1 {fault.kind} {code}\r\nContent-Length: {len(body)}\r\n{wait}"
    writer.write(f"{head}Content-Type: application/xml\r\n\r\n".encode() + body)
    await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset (RST), not with an orderly end."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """The one proxy in front of the S3 server; each test sets its schedule."""
    with FaultProxy(s3_server.endpoint).running() as proxy:
        yield proxy


@pytest.fixture
def faulty_server(s3_server: S3Server, proxy: FaultProxy) -> S3Server:
    """The S3 server behind the proxy."""
    proxy.set(no_faults)
    return s3_server._replace(endpoint=proxy.endpoint)
