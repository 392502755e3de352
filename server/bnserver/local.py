"""Local sockets: the way of a rank on the service's machine around gRPC, for what is asked and answered all the time.

One exchange of two ranks costs gRPC's threads and loops more than everything else together. A local socket belongs to
a stream, which stays: it says how the conversation ends, and the two end together. The socket's name lies in the
abstract namespace: it leaves no file behind, and ranks on other machines or in other network namespaces don't find it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.frames import LARGEST_BYTES, Frames, framed
from bnproto.v1 import statistics_pb2 as pb

_ATTACH_WITHIN_S = 5.0  # who connects and shows no ticket is shown out
_ATTACH_BYTES = 64  # and may not send more than this

_log = logging.getLogger("bnserver")


@dataclass(frozen=True, slots=True)
class Visitors:
    """What the rim does with what comes in.

    Attributes:
        asked: a stream's rank sent a request on its socket.
        garbled: it sent what can't be read.
    """

    asked: Callable[[int, pb.ExchangeRequest], None]
    garbled: Callable[[int, str], None]


class LocalSockets:
    """The listener, and the sockets that belong to streams.

    Args:
        boot_id: names this run of the service.
        visitors: are told what comes in.
    """

    def __init__(self, boot_id: int, visitors: Visitors) -> None:
        self.visitors = visitors
        self._boot_id = boot_id
        self._name = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._tickets: dict[bytes, int] = {}  # not used yet
        self._invited: dict[int, bytes] = {}
        self._sockets: dict[int, LocalSocket] = {}
        self._strangers: set[LocalSocket] = set()

    async def open(self, port: int) -> None:
        """Listen; where the machine has no such sockets, ranks stay on their streams.

        Args:
            port: that the service listens on.
        """
        name = f"bnserver-{secrets.token_hex(8)}"
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(lambda: LocalSocket(self), f"\0{name}")
        except OSError as error:
            _log.warning("no local sockets (%s): ranks on this machine exchange over gRPC", error)
            return
        self._name, self._port = name, port

    def close(self) -> None:
        """Listen no more, and end every socket."""
        if self._server is not None:
            self._server.close()
        for socket in [*self._sockets.values(), *self._strangers]:
            socket.close()

    def invitation(self, stream: int) -> pb.LocalSocket | None:
        """How a stream's rank gets a socket; None where there are none."""
        if not self._name:
            return None
        ticket = secrets.token_bytes(16)
        self._tickets[ticket], self._invited[stream] = stream, ticket
        return pb.LocalSocket(name=self._name, ticket=ticket, port=self._port)

    def stands(self, stream: int) -> bool:
        """Whether a stream has a socket."""
        return stream in self._sockets

    def send(self, stream: int, data: bytes) -> None:
        """Answer on a stream's socket, with messages that are framed already: all ranks get the same."""
        self._sockets[stream].send(data)

    def end(self, stream: int) -> None:
        """A stream has ended: its socket ends, and its ticket is worth nothing."""
        self._tickets.pop(self._invited.pop(stream, b""), None)
        socket = self._sockets.pop(stream, None)
        if socket is not None:
            socket.close()

    # ---- what a socket says of itself ----

    def came(self, socket: LocalSocket) -> None:
        """Somebody has connected."""
        self._strangers.add(socket)

    def attached(self, socket: LocalSocket, ticket: bytes) -> int | None:
        """Somebody shows a ticket; returns the stream, or None for a ticket that is not valid."""
        stream = self._tickets.pop(ticket, None)
        if stream is None:
            return None
        self._strangers.discard(socket)
        self._sockets[stream] = socket
        socket.send(framed(pb.ExchangeResponse(boot_id=self._boot_id, attached=pb.Attached())))
        return stream

    def gone(self, socket: LocalSocket, stream: int | None) -> None:
        """A socket has ended."""
        self._strangers.discard(socket)
        if stream is not None and self._sockets.get(stream) is socket:
            del self._sockets[stream]


class LocalSocket(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, sockets: LocalSockets) -> None:
        self._sockets = sockets
        self._frames = Frames(_ATTACH_BYTES)
        self._stream: int | None = None
        self._transport: asyncio.Transport | None = None
        self._hurry: asyncio.TimerHandle | None = None

    def send(self, data: bytes) -> None:
        """Send at once what the kernel takes, and the rest when it does."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """End it once all is sent."""
        if self._transport is not None:
            self._transport.close()

    # ---- what the loop says ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a ticket."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._sockets.came(self)
        self._hurry = asyncio.get_running_loop().call_later(_ATTACH_WITHIN_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, from either side."""
        del exc
        self._calm()
        self._transport = None
        self._sockets.gone(self, self._stream)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        del sizehint
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Something was received."""
        self._frames.came(nbytes)
        try:
            while self._transport is not None and (data := self._frames.next()) is not None:
                self._take(pb.ExchangeRequest.FromString(data))
        except (WireError, DecodeError) as error:
            self._garbled(str(error))

    def _take(self, request: pb.ExchangeRequest) -> None:
        if self._stream is not None:
            self._sockets.visitors.asked(self._stream, request)
            return
        self._stream = self._sockets.attached(self, request.attach.ticket)
        if self._stream is None:
            self.close()
            return
        self._frames.largest = LARGEST_BYTES
        self._calm()

    def _garbled(self, text: str) -> None:
        if self._stream is not None:
            self._sockets.visitors.garbled(self._stream, text)
        elif self._transport is not None:
            self._transport.abort()

    def _calm(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
