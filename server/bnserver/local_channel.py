"""Local sockets: a rank on the service's machine sends its requests and gets its answers here, and not over gRPC.

In an exchange of two ranks gRPC's threads and loops cost more than everything else together. A local socket belongs to
a connection, whose gRPC stream stays open: errors are sent on the stream alone, and the two end together. The socket's
name is in the abstract namespace: it leaves no file behind, and ranks on other machines or in other network namespaces
can't reach it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.failures import StatusParts
from bnproto.frames import LARGEST_BYTES, Frames
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.quotas import QuotaError
from bnserver.failpoints import Failpoints
from bnserver.rank_channel import Outgoing, RequestAssembler

# A rank waits for its answer before it asks again. Whoever sends thousands of small messages at once waits for others.
_AT_ONCE = 16
_ATTACH_BYTES = 64  # that a socket may send before its ticket was seen


class Owner(Protocol):
    """Who accepted a socket: the listener."""

    failpoints: Failpoints
    attach_within_s: float

    def connected(self, channel: LocalChannel) -> None:
        """It has connected."""

    def attach(self, channel: LocalChannel, ticket: bytes) -> Connection | None:
        """It presents a ticket; returns its connection, None for an invalid one."""

    def disconnected(self, channel: LocalChannel) -> None:
        """It has ended."""


class LocalChannel(asyncio.BufferedProtocol):
    """One socket, driven by the event loop.

    Args:
        listener: that accepted it.
        user: the number of the user at the other end.

    Attributes:
        is_closed: whether it has ended, from either side.
        unread: how many answers were sent since there was last nothing left to send.
    """

    def __init__(self, listener: Owner, user: int) -> None:
        self.user = user
        self._listener = listener
        self._failpoints = listener.failpoints
        self._frames = Frames(_ATTACH_BYTES)
        self._assembler = RequestAssembler()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        self.unread = 0
        self.is_closed = False
        self._attach_timer: asyncio.TimerHandle | None = None
        self._unsent: deque[Outgoing] = deque()
        self._is_full = False
        self._has_more = False  # than was handled in one turn: nothing is read meanwhile

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages after those before, each once the kernel has taken the one before."""
        if self.is_closed:
            return
        if self._connection is not None and self._failpoints.active and self._failpoints.reached("before-reply"):
            self._connection.disconnected()
            return
        self.unread = self.unread + 1 if self._unsent or self._is_full else 0
        self._unsent.extend(messages)
        while self._unsent and not self._is_full and self._transport is not None:
            message = self._unsent.popleft()
            self._transport.write(message.data or message.frame())
        if self._connection is not None and self._failpoints.active:
            self._failpoints.reached("after-reply")

    def close(self, status: StatusParts | None) -> None:
        """End it at once, without sending the rest; the stream says why."""
        del status
        self.is_closed = True
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a ticket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._attach_timer = asyncio.get_running_loop().call_later(self._listener.attach_within_s, transport.abort)
        self._listener.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, from either side."""
        del exc
        self._cancel_timer()
        self._transport = None
        self._unsent.clear()
        self._listener.disconnected(self)
        was_closed, self.is_closed = self.is_closed, True
        if self._connection is not None and not was_closed:
            self._connection.disconnected()

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
        self._take()

    def _take(self) -> None:
        """Handle what has arrived: a few messages, then the other connections have their turn."""
        try:
            for _ in range(_AT_ONCE):
                if self.is_closed or (data := self._frames.next()) is None:
                    self._read_on()
                    return
                message = pb.ExchangeRequest.FromString(data)
                if self._connection is None:
                    self._attach(message.attach.ticket)
                elif (assembled := self._assembler.add(message)) is not None:
                    self._connection.receive(*assembled)
        except (WireError, QuotaError, DecodeError) as error:
            self._garbled(error)
            return
        if not self._has_more and self._transport is not None:
            self._has_more = True
            self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._take)

    def _read_on(self) -> None:
        """Everything is handled that has arrived."""
        if self._has_more and self._transport is not None and not self.is_closed:
            self._transport.resume_reading()
        self._has_more = False

    def _attach(self, ticket: bytes) -> None:
        self._connection = self._listener.attach(self, ticket)
        if self._connection is None:
            self.close(None)
            return
        self._frames.largest = LARGEST_BYTES
        self._assembler = RequestAssembler(self._connection.account.add)
        self._cancel_timer()

    def _garbled(self, error: Exception) -> None:
        """Report invalid bytes; nothing that follows them can be read."""
        if self._connection is not None:
            self._connection.garbled(error)
        self.close(None)

    def _cancel_timer(self) -> None:
        if self._attach_timer is not None:
            self._attach_timer.cancel()
            self._attach_timer = None
