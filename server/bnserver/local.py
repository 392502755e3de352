"""Local sockets: the way of a rank on the service's machine around gRPC, for what is asked and answered all the time.

One exchange of two ranks costs gRPC's threads and loops more than everything else together. A local socket belongs to
a stream, which stays: it says how the conversation ends, and the two end together. The socket's name lies in the
abstract namespace: it leaves no file behind, and ranks on other machines or in other network namespaces don't find it.
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

_ATTACH_WITHIN_S = 5.0  # who connects and shows no ticket is shown out
_ATTACH_BYTES = 64  # and may not send more than this
# At a time; one more, and the first is shown out. Ranks of a large job are strangers, too, for a moment.
_STRANGERS = 512
_BACKLOG = 4096  # ranks that connect at once, as all of a job do; the kernel takes less if its own limit is lower

_log = logging.getLogger("bnserver")


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What the rim does with what comes in.

    Attributes:
        asked: a stream's rank sent a request on its socket.
        garbled: it sent what can't be read.
        lost: its socket ended, and nobody here has ended it.
    """

    asked: Callable[[int, pb.ExchangeRequest], None]
    garbled: Callable[[int, str], None]
    lost: Callable[[int], None]


class Frame:
    """A message for one socket or several, as bytes once the first of them takes it."""

    __slots__ = ("_data", "_message")

    def __init__(self, message: Message) -> None:
        self._message = message
        self._data = b""

    @property
    def data(self) -> bytes:
        """What travels."""
        self._data = self._data or framed(self._message)
        return self._data


class LocalSockets:
    """The listener, and the sockets that belong to streams.

    Args:
        boot_id: names this run of the service.
        callbacks: are told what comes in.
        attach_within_s: seconds in which whoever connects must show a ticket.
    """

    def __init__(self, boot_id: int, callbacks: Callbacks, attach_within_s: float = _ATTACH_WITHIN_S) -> None:
        self.callbacks = callbacks
        self.attach_within_s = attach_within_s
        self._boot_id = boot_id
        self._name = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._closed = False
        self._tickets: dict[bytes, int] = {}  # not used yet
        self._invited: dict[int, bytes] = {}
        self._sockets: dict[int, LocalSocket] = {}
        self._strangers: dict[LocalSocket, None] = {}  # in the order in which they came

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
            for _ in range(2):  # asyncio fails at whoever it has let in, and not yet made a transport for
                await asyncio.sleep(0)
            self._server.close()
        for stream in tuple(self._sockets):
            self.end(stream)
        for socket in tuple(self._strangers):
            socket.end()

    def invitation(self, stream: int) -> pb.LocalSocket | None:
        """How a stream's rank gets a socket; None where there are none."""
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
        """A stream ends: so does its socket, whatever is still to be sent, and its ticket is worth nothing."""
        self._tickets.pop(self._invited.pop(stream, b""), None)
        socket = self._sockets.pop(stream, None)
        if socket is not None:
            socket.end()

    # ---- what a socket says of itself ----

    def connected(self, socket: LocalSocket) -> None:
        """Somebody has connected."""
        self._strangers[socket] = None
        if self._closed:  # it was at the door already
            socket.end()
        if len(self._strangers) > _STRANGERS:
            next(iter(self._strangers)).end()

    def attached(self, socket: LocalSocket, ticket: bytes) -> int | None:
        """Somebody shows a ticket; returns the stream, or None for a ticket that is not valid."""
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
        """Send in this order, each message when the kernel has taken the one before."""
        self._unsent.extend(frames)
        self._send_more()

    def end(self) -> None:
        """End it at once."""
        self._unsent.clear()
        if self._transport is not None:
            self._transport.abort()

    # ---- what the loop says ----

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
        """The kernel takes no more."""
        self._full = True

    def resume_writing(self) -> None:
        """It does again."""
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
        """Say so to whoever sent it; nothing that follows can be read."""
        if self._stream is not None:
            self._sockets.callbacks.garbled(self._stream, text)
        self.end()

    def _calm(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
