"""Local sockets: a rank on the service's machine sends its requests and gets its answers here, and not over gRPC.

In an exchange of two ranks gRPC's threads and loops cost more than everything else together. A local socket belongs to
a stream, which stays open: errors are sent on the stream alone, and the two end together. The socket's name is in the
abstract namespace: it leaves no file behind, and ranks on other machines or in other network namespaces can't reach it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from bnproto.arrays import WireError
from bnproto.frames import LARGEST_BYTES, Frames, framed
from bnproto.v1 import statistics_pb2 as pb

_ATTACH_WITHIN_S = 5.0  # a connection that has sent no ticket by then is closed
_ATTACH_BYTES = 64  # and may not send more than this before
# Connections without a ticket at a time; one more closes the oldest. All ranks of a large job may connect at once.
_STRANGERS = 512
_BACKLOG = 4096  # ranks that connect at once, as all of a job do; the kernel takes less if its own limit is lower

_log = logging.getLogger("bnserver")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The servicer's callbacks.

    Attributes:
        asked: a stream's rank sent a request on its socket.
        garbled: it sent bytes that are no valid message.
        lost: its socket ended, and was not ended by the service.
    """

    asked: Callable[[int, pb.ExchangeRequest], None]
    garbled: Callable[[int, str], None]
    lost: Callable[[int], None]


class Frame:
    """A message for one or several sockets, serialized when the first of them sends it."""

    __slots__ = ("_data", "_message")

    def __init__(self, message: Message) -> None:
        self._message = message
        self._data = b""

    @property
    def data(self) -> bytes:
        """The bytes to send."""
        self._data = self._data or framed(self._message)
        return self._data


class LocalSockets:
    """The listener, and the sockets that belong to streams.

    Args:
        boot_id: names this run of the service.
        callbacks: called for what comes in.
        attach_within_s: seconds in which a connection must present its ticket.
    """

    def __init__(self, boot_id: int, callbacks: Callbacks, attach_within_s: float = _ATTACH_WITHIN_S) -> None:
        self.callbacks = callbacks
        self.attach_within_s = attach_within_s
        self._boot_id = boot_id
        self._name = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._closed = False
        self._tickets: dict[bytes, int] = {}  # not presented yet
        self._invited: dict[int, bytes] = {}
        self._sockets: dict[int, LocalSocket] = {}
        self._strangers: dict[LocalSocket, None] = {}  # in the order of connecting

    async def open(self, port: int) -> None:
        """Listen; where the machine has no such sockets, ranks stay on their streams.

        Args:
            port: that the service listens on.
        """
        name = f"bnserver-{secrets.token_hex(8)}"
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: LocalSocket(self), f"\0{name}", backlog=_BACKLOG)
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
        for stream in tuple(self._sockets):
            self.end(stream)
        for socket in tuple(self._strangers):
            socket.end()

    def invitation(self, stream: int) -> pb.LocalSocket | None:
        """The address and ticket for a stream's rank; None where there are no local sockets."""
        if not self._name:
            return None
        ticket = secrets.token_bytes(16)
        self._tickets[ticket], self._invited[stream] = stream, ticket
        return pb.LocalSocket(name=self._name, ticket=ticket, port=self._port)

    def is_active(self, stream: int) -> bool:
        """Whether a stream has a socket."""
        return stream in self._sockets

    def send(self, stream: int, frames: Iterable[Frame]) -> None:
        """Answer on a stream's socket."""
        self._sockets[stream].send(frames)

    def end(self, stream: int) -> None:
        """A stream ends: end its socket without sending the rest, and revoke its ticket."""
        self._tickets.pop(self._invited.pop(stream, b""), None)
        socket = self._sockets.pop(stream, None)
        if socket is not None:
            socket.end()

    # ---- called by a socket ----

    def connected(self, socket: LocalSocket) -> None:
        """A socket has connected."""
        self._strangers[socket] = None
        if self._closed:  # it was accepted before the listener closed
            socket.end()
        if len(self._strangers) > _STRANGERS:
            next(iter(self._strangers)).end()

    def attached(self, socket: LocalSocket, ticket: bytes) -> int | None:
        """A socket presents a ticket; returns the stream, or None for an invalid ticket."""
        stream = self._tickets.pop(ticket, None)
        if stream is None:
            return None
        self._strangers.pop(socket)
        self._sockets[stream] = socket
        socket.send([Frame(pb.ExchangeResponse(boot_id=self._boot_id, attached=pb.Attached()))])
        return stream

    def disconnected(self, socket: LocalSocket, stream: int | None) -> None:
        """A socket has ended."""
        self._strangers.pop(socket, None)
        if stream is not None and self._sockets.get(stream) is socket:
            self.callbacks.lost(stream)


class LocalSocket(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, sockets: LocalSockets) -> None:
        self._sockets = sockets
        self._frames = Frames(_ATTACH_BYTES)
        self._stream: int | None = None
        self._transport: asyncio.Transport | None = None
        self._hurry: asyncio.TimerHandle | None = None
        self._unsent: deque[Frame] = deque()
        self._full = False

    def send(self, frames: Iterable[Frame]) -> None:
        """Send in this order, each message once the kernel has taken the one before."""
        self._unsent.extend(frames)
        self._send_more()

    def end(self) -> None:
        """End it at once."""
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    # ---- called by the event loop ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a ticket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._hurry = asyncio.get_running_loop().call_later(self._sockets.attach_within_s, transport.abort)
        self._sockets.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, from either side."""
        del exc
        self._calm()
        self._transport = None
        self._unsent.clear()
        self._sockets.disconnected(self, self._stream)

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self._full = True

    def resume_writing(self) -> None:
        """The kernel's buffer has room again."""
        self._full = False
        self._send_more()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        del sizehint
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Something was received."""
        self._frames.received(nbytes)
        try:
            while self._open and (data := self._frames.next()) is not None:
                self._take(pb.ExchangeRequest.FromString(data))
        except (WireError, DecodeError) as error:
            self._garbled(str(error))

    @property
    def _open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def _send_more(self) -> None:
        while self._unsent and not self._full and self._transport is not None:
            self._transport.write(self._unsent.popleft().data)

    def _take(self, request: pb.ExchangeRequest) -> None:
        if self._stream is not None:
            self._sockets.callbacks.asked(self._stream, request)
            return
        self._stream = self._sockets.attached(self, request.attach.ticket)
        if self._stream is None:
            self.end()
            return
        self._frames.largest = LARGEST_BYTES
        self._calm()

    def _garbled(self, text: str) -> None:
        """Report invalid bytes; nothing that follows them can be read."""
        if self._stream is not None:
            self._sockets.callbacks.garbled(self._stream, text)
        self.end()

    def _calm(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
