"""A channel: the way on which one rank's requests come in and its answers go out.

A connection has one channel at a time. It is decided when the connection is made, by the rank: the gRPC stream on which
it joined (`grpc_channel`), or a local socket that it attaches to that stream (`local_channel`). Nothing above a channel
asks which one it is.

A channel gives whole requests to its `Connection`, in the order in which they were sent. What cannot be read ends
there as `Connection.garbled`, and the end of the channel as `Connection.disconnected`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from bnproto.arrays import PayloadAssembler, WireError
from bnproto.failures import StatusParts
from bnproto.frames import framed
from bnproto.v1 import statistics_pb2 as pb


class Outgoing:
    """A message for one or several channels.

    Attributes:
        message: as gRPC takes it.
        data: as a local socket takes it; made when the first of them sends it.
        payload_bytes: of the answer that begins with this message, in all its parts.
    """

    __slots__ = ("data", "message", "payload_bytes")

    def __init__(self, message: pb.ExchangeResponse, payload_bytes: int = 0) -> None:
        self.message = message
        self.data = b""
        self.payload_bytes = payload_bytes

    def frame(self) -> bytes:
        """The bytes that a local socket sends."""
        self.data = self.data or framed(self.message)
        return self.data


class Channel(Protocol):
    """Carries answers, each in the order in which it was sent, and none twice.

    Attributes:
        unread: how many answers were sent since there was last nothing left to send.
    """

    unread: int

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send messages after those before; never waits. After the end it does nothing."""

    def close(self, status: StatusParts | None) -> None:
        """End it, without a wait; a second time does nothing.

        Args:
            status: why, if the rank is to get an error; a local socket can't say it, and leaves it to the stream.
        """


class RequestAssembler:
    """Puts requests together from the messages in which they travel on one channel.

    Args:
        account: called before any bytes of a payload are kept, with how many there are, and with the size that was
            announced; None for those that continue a payload. It may raise.
    """

    def __init__(self, account: Callable[[int, int | None], None] | None = None) -> None:
        self._account = account
        self._begun: tuple[pb.ExchangeRequest, PayloadAssembler] | None = None

    def add(self, message: pb.ExchangeRequest) -> tuple[pb.ExchangeRequest, bytes | bytearray] | None:
        """Take the next message; returns the request that it completes, and all bytes of its payload.

        Raises:
            WireError: it does not continue the request that has begun, or begins none.
            QuotaError: from `account`.
        """
        kind = message.WhichOneof("message")
        if (kind == "part") is not (self._begun is not None):
            raise WireError(f"expected {'a part' if self._begun else 'no part'} here, received {kind}")
        if self._begun is not None:
            request, assembler = self._begun
            if self._account is not None:
                self._account(message.ByteSize(), None)  # its data would be copied
            assembler.add(message.part)
        elif kind in ("contribution", "push"):
            payload = message.contribution.payload if kind == "contribution" else message.push.payload
            data = payload.data
            if self._account is not None:
                self._account(len(data), payload.size)
            if len(data) == payload.size:
                return message, data
            request, assembler = message, PayloadAssembler(payload)
        else:
            return message, b""
        self._begun = None if assembler.complete else (request, assembler)
        return (request, assembler.data) if assembler.complete else None
