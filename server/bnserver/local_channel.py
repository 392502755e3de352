"""Local sockets: a rank on the service's machine sends its requests and gets its answers here, and not over gRPC.

In an exchange of two ranks gRPC's threads and loops cost more than everything else together. A local socket belongs to
a connection, whose gRPC stream stays open: errors are sent on the stream alone, and the two end together. The socket's
name is in the abstract namespace: it leaves no file behind, and ranks on other machines or in other network namespaces
can't reach it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.failures import StatusParts
from bnproto.frames import LARGEST_BYTES, Frames
from bnproto.v1 import statistics_pb2 as pb
from bnserver.channel import Outgoing, RequestAssembler
from bnserver.connection import Connection
from bnserver.failpoints import Failpoints

_ATTACH_WITHIN_S = 5.0  # a socket that has sent no ticket by then is closed
_ATTACH_BYTES = 64  # and may not send more than this before
# Sockets without a ticket at a time; one more closes the oldest. All ranks of a large job may connect at once.
_STRANGERS = 512
_BACKLOG = 4096  # ranks that connect at once, as all of a job do; the kernel takes less if its own limit is lower

_log = logging.getLogger("bnserver")


class LocalListener:
    """The listener: it matches sockets that connect with the connections that were invited.

    Args:
        boot_id: names this run of the service.
        failpoints: faults to inject.
        attach_within_s: seconds in which a socket must present its ticket.
    """

    def __init__(
        self, boot_id: int, failpoints: Failpoints | None = None, attach_within_s: float = _ATTACH_WITHIN_S
    ) -> None:
        self.failpoints = failpoints or Failpoints()
        self.attach_within_s = attach_within_s
        self._boot_id = boot_id
        self._name = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._closed = False
        self._tickets: dict[bytes, Connection] = {}  # not presented yet
        self._invited: dict[Connection, bytes] = {}
        self._attached: set[LocalChannel] = set()
        self._strangers: dict[LocalChannel, None] = {}  # in the order of connecting

    @property
    def attached(self) -> int:
        """How many sockets belong to a connection."""
        return len(self._attached)

    async def open(self, port: int) -> None:
        """Listen; where the machine has no such sockets, ranks stay on their streams.

        Args:
            port: that the service listens on.
        """
        name = f"bnserver-{secrets.token_hex(8)}"
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: LocalChannel(self), f"\0{name}", backlog=_BACKLOG)
        except OSError as error:
            _log.warning("no local sockets (%s): ranks on this machine exchange over gRPC", error)
            return
        self._name, self._port = name, port

    async def close(self) -> None:
        """Listen no more, and end every socket."""
        self._closed = True
        if self._server is not None:
            for listening in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(2):  # asyncio fails on a connection that it has accepted, and has no transport for yet
                await asyncio.sleep(0)
            self._server.close()
        for channel in (*self._attached, *self._strangers):
            channel.close(None)

    def invitation(self, connection: Connection) -> pb.LocalSocket | None:
        """The address and ticket for a connection's rank; None where there are no local sockets."""
        if not self._name:
            return None
        ticket = secrets.token_bytes(16)
        self._tickets[ticket], self._invited[connection] = connection, ticket
        return pb.LocalSocket(name=self._name, ticket=ticket, port=self._port)

    def revoke(self, connection: Connection) -> None:
        """A connection has ended: its ticket is good for nothing any more."""
        self._tickets.pop(self._invited.pop(connection, b""), None)

    # ---- called by a socket ----

    def connected(self, channel: LocalChannel) -> None:
        """A socket has connected."""
        self._strangers[channel] = None
        if self._closed:  # it was accepted before the listener closed
            channel.close(None)
        if len(self._strangers) > _STRANGERS:
            next(iter(self._strangers)).close(None)

    def attach(self, channel: LocalChannel, ticket: bytes) -> Connection | None:
        """A socket presents a ticket; returns the connection that it belongs to, or None for an invalid ticket."""
        connection = self._tickets.pop(ticket, None)
        if connection is None or connection.is_over:
            return None
        self._strangers.pop(channel)
        self._attached.add(channel)
        connection.channel = channel
        channel.send([Outgoing(pb.ExchangeResponse(boot_id=self._boot_id, attached=pb.Attached()))])
        return connection

    def disconnected(self, channel: LocalChannel) -> None:
        """A socket has ended."""
        self._strangers.pop(channel, None)
        self._attached.discard(channel)


class LocalChannel(asyncio.BufferedProtocol):
    """One socket, driven by the event loop."""

    def __init__(self, listener: LocalListener) -> None:
        self._listener = listener
        self._failpoints = listener.failpoints
        self._frames = Frames(_ATTACH_BYTES)
        self._assembler = RequestAssembler()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        self._is_closed = False
        self._hurry: asyncio.TimerHandle | None = None
        self._unsent: deque[Outgoing] = deque()
        self._is_full = False

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages after those before, each once the kernel has taken the one before."""
        if self._is_closed:
            return
        if self._connection is not None and self._failpoints.active and self._failpoints.reached("before-reply"):
            self._connection.lost()
            return
        self._unsent.extend(messages)
        while self._unsent and not self._is_full and self._transport is not None:
            message = self._unsent.popleft()
            self._transport.write(message.data or message.frame())
        if self._connection is not None and self._failpoints.active:
            self._failpoints.reached("after-reply")

    def close(self, status: StatusParts | None) -> None:
        """End it at once, without sending the rest; the stream says why."""
        del status
        self._is_closed = True
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a ticket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._hurry = asyncio.get_running_loop().call_later(self._listener.attach_within_s, transport.abort)
        self._listener.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, from either side."""
        del exc
        self._calm()
        self._transport = None
        self._unsent.clear()
        self._listener.disconnected(self)
        was_closed, self._is_closed = self._is_closed, True
        if self._connection is not None and not was_closed:
            self._connection.lost()

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self._is_full = True

    def resume_writing(self) -> None:
        """The kernel's buffer has room again."""
        self._is_full = False
        while self._unsent and not self._is_full and self._transport is not None:
            self._transport.write(self._unsent.popleft().frame())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        del sizehint
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Something was received."""
        self._frames.received(nbytes)
        try:
            while not self._is_closed and (data := self._frames.next()) is not None:
                message = pb.ExchangeRequest.FromString(data)
                if self._connection is None:
                    self._attach(message.attach.ticket)
                elif (whole := self._assembler.add(message)) is not None:
                    self._connection.receive(*whole)
        except (WireError, DecodeError) as error:
            self._garbled(str(error))

    def _attach(self, ticket: bytes) -> None:
        self._connection = self._listener.attach(self, ticket)
        if self._connection is None:
            self.close(None)
            return
        self._frames.largest = LARGEST_BYTES
        self._calm()

    def _garbled(self, text: str) -> None:
        """Report invalid bytes; nothing that follows them can be read."""
        if self._connection is not None:
            self._connection.garbled(text)
        self.close(None)

    def _calm(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
