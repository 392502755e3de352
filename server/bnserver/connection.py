"""A connection: one rank at the other end, from its join to its end.

It is the one place through which whatever a rank sends must pass: requests become events here, and are validated here
(`translation.Reader`, `core.validation`), so the core gets nothing that is invalid by itself. What a rank may send, and
how much of it, is for this object to decide.
"""

from __future__ import annotations

from collections.abc import Callable

from bnproto.failures import StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.channel import Channel
from bnserver.core.events import Event, Lost, Malformed
from bnserver.failpoints import Failpoints
from bnserver.translation import Reader


class Connection:
    """One rank's connection.

    Args:
        number: names it in the core's events and effects, where it is called a stream; it is never used again.
        stream: the gRPC stream, on which it began.
        dispatch: takes the events.
        failpoints: faults to inject.

    Attributes:
        channel: carries requests and answers: the stream, or a local socket that was attached to it.
        generation: of the job that its rank is in; 0 before all ranks have joined.
        is_over: whether the service has ended it.
    """

    def __init__(
        self,
        number: int,
        stream: Channel,
        dispatch: Callable[[Event], None],
        failpoints: Failpoints | None = None,
    ) -> None:
        self.number = number
        self.channel = stream
        self.generation = 0
        self.is_over = False
        self._stream = stream
        self._dispatch = dispatch
        self._failpoints = failpoints or Failpoints()
        self._reader = Reader(number)

    def joined(self, generation: int, world_size: int) -> None:
        """Its rank is in a generation of so many ranks."""
        self.generation = generation
        self._reader.joined(world_size)

    def receive(self, request: pb.ExchangeRequest, data: bytes | bytearray) -> None:
        """A whole request has arrived, on any channel.

        Args:
            request: its first message.
            data: all bytes of its payload.
        """
        event = self._reader.read(request, data)
        if self._failpoints.active:
            self._failpoints.reached("before-event")
        self._dispatch(event)

    def garbled(self, text: str) -> None:
        """A channel received bytes or messages that make no sense."""
        self._dispatch(Malformed(self.number, text))

    def lost(self) -> None:
        """A channel has ended from the rank's side: the connection ends as a whole."""
        self._dispatch(Lost(self.number))
        self.end(None)

    def end(self, status: StatusParts | None) -> None:
        """End it from the service's side, with an error or None; a second time does nothing."""
        self.is_over = True
        self._stream.close(status)
        self.channel.close(status)
