"""A proxy between a rank and the service, which breaks connections as a plan says.

It runs in a thread of the test's own, on ports the kernel chose, and is gone with the `with` block.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

from support.fault.faults import Fault, Kind

_CHUNK = 2**16
_LATE_CHUNKS = 20
_CLOSING_S = 0.01
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends a reset

Plan = Callable[[int, int], Fault]
"""The fault of a rank's connection, by rank and number."""


_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """One port per rank.

    Args:
        target: HOST:PORT of the service, which may come and go.
        ranks: how many.
        plan: what happens to each connection.

    Attributes:
        addresses: where each rank connects, in rank order.
        struck: how often each kind of fault has struck.
        story: a line for each.
        latest: when the latest one struck, on the monotonic clock.
    """

    def __init__(self, target: str, ranks: int, plan: Plan) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._connections = [0] * ranks
        self._latest: dict[int, _Link] = {}
        self._links: set[asyncio.Task[None]] = set()
        self.struck: Counter[str] = Counter()
        self.story: list[str] = []
        self.latest = 0.0
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
        self.addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
        self._thread = Thread(target=self._run, args=(sockets,), name="fault-proxy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every connection, and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, sockets: list[socket.socket]) -> None:
        asyncio.set_event_loop(self._loop)
        servers = [self._loop.run_until_complete(self._serve(rank, one)) for rank, one in enumerate(sockets)]
        self._loop.run_forever()
        for server in servers:
            server.close()
        self._loop.run_until_complete(self._end_all())
        self._loop.close()

    async def _end_all(self) -> None:
        """End every link, those included that come up meanwhile."""
        await asyncio.sleep(_CLOSING_S)
        while self._links:
            for link in tuple(self._links):
                link.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)
            await asyncio.sleep(_CLOSING_S)  # transports close in turns of the loop

    async def _serve(self, rank: int, at: socket.socket) -> asyncio.Server:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # A task of our own: asyncio's, for a coroutine, complains of being cancelled.
            task = self._loop.create_task(self._link(rank, (reader, writer)))
            self._links.add(task)
            task.add_done_callback(self._links.discard)

        return await asyncio.start_server(connected, sock=at)

    async def _link(self, rank: int, here: _End) -> None:
        number = self._connections[rank]
        self._connections[rank] += 1
        fault = self._plan(rank, number)
        try:
            there = await asyncio.open_connection(self._host, self._port)
        except (OSError, asyncio.CancelledError):
            _reset(here[1])  # nobody listens there at present
            return
        link = self._latest[rank] = _Link(fault, lambda kind: self._note(rank, number, kind))
        await link.run(here, there)

    def strike(self, rank: int, fault: Fault) -> None:
        """Let this happen to the connection that a rank has now; `after` counts from here."""
        self._loop.call_soon_threadsafe(lambda: self._latest[rank].expect(fault))

    def _note(self, rank: int, number: int, fault: Fault) -> None:
        self.latest = time.monotonic()
        self.struck[fault.kind] += 1
        self.story.append(f"rank {rank}, connection {number}: {fault}")


class _Link:
    """One connection, from end to end."""

    def __init__(self, fault: Fault, note: Callable[[Fault], None]) -> None:
        self._fault = fault
        self._passed = {True: 0, False: 0}
        self._note = note
        self._struck = False
        self._late = 0
        self._writers: list[asyncio.StreamWriter] = []

    def expect(self, fault: Fault) -> None:
        """Take another fault, which has not struck yet."""
        self._fault = replace(fault, after=self._passed[fault.up] + fault.after)

    async def run(self, rank: _End, service: _End) -> None:
        """Pass bytes both ways until both are at their end."""
        self._writers = [rank[1], service[1]]
        ways = [self._pass(rank[0], service[1], up=True), self._pass(service[0], rank[1], up=False)]
        try:
            await asyncio.gather(*ways)
            self._end_both(asyncio.StreamWriter.close)
        except asyncio.CancelledError:
            self._end_both(_reset)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        """Pass on the bytes of one way, and how it ends; but what is swallowed has no end either."""
        try:
            while data := await source.read(_CHUNK):
                if self._fault.up is up:
                    await self._through(sink, data, self._fault.after - self._passed[up])
                elif self._struck and self._fault.kind is Kind.LOST_REPLY:
                    self._end_both(_reset)
                elif not self._swallows(up):
                    await _write(sink, data)
                self._passed[up] += len(data)
            if not sink.is_closing() and not self._swallows(up):
                sink.write_eof()
        except OSError:
            if not self._swallows(up):
                self._end_both(_reset)

    def _swallows(self, up: bool) -> bool:
        """Whether nothing arrives any more that goes this way."""
        silent = self._struck and self._fault.kind in (Kind.BLACKHOLE, Kind.HALF_CLOSE)
        return silent and (self._fault.up is up or self._fault.both)

    async def _through(self, sink: asyncio.StreamWriter, data: bytes, left: int) -> None:
        """Bytes on the way that the fault is about; it strikes after so many more."""
        if self._struck:
            await self._after_strike(sink, data)
        elif len(data) < left or self._fault.kind is Kind.NONE:
            await _write(sink, data)
        else:
            await _write(sink, data[:left])
            self._struck = True
            self._note(self._fault)
            await self._strike(sink, data[left:])

    async def _strike(self, sink: asyncio.StreamWriter, rest: bytes) -> None:
        match self._fault.kind:
            case Kind.CUT:
                self._end_both(_reset)
            case Kind.CLOSE:
                self._end_both(asyncio.StreamWriter.close)
            case Kind.HALF_CLOSE:
                sink.write_eof()
            case Kind.BLACKHOLE:
                asyncio.get_running_loop().call_later(self._fault.seconds, self._end_both, _reset)
            case Kind.DELAY:
                self._late = _LATE_CHUNKS
                await self._after_strike(sink, rest)
            case _:
                await _write(sink, rest)

    async def _after_strike(self, sink: asyncio.StreamWriter, data: bytes) -> None:
        if self._swallows(self._fault.up):
            return
        await asyncio.sleep(self._fault.seconds if self._late else 0.0)
        await _write(sink, data)
        if self._late == 1:
            self._end_both(_reset)
        self._late = max(0, self._late - 1)

    def _end_both(self, end: Callable[[asyncio.StreamWriter], None]) -> None:
        for writer in self._writers:
            end(writer)


async def _write(sink: asyncio.StreamWriter, data: bytes) -> None:
    if data and not sink.is_closing():
        sink.write(data)
        await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    at: socket.socket = writer.get_extra_info("socket")
    if at.fileno() >= 0:
        at.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


@contextmanager
def proxy(target: str, ranks: int, plan: Plan) -> Iterator[Proxy]:
    """A proxy for the length of a `with` block."""
    between = Proxy(target, ranks, plan)
    try:
        yield between
    finally:
        between.close()
