"""A connection: one rank at the other end, from its join to its end.

It is the one place through which whatever a rank sends must pass: requests become events here, and are validated here
(`translation.Reader`, `core.validation`), so the core gets nothing that is invalid by itself. What a rank may send, and
how much of it, is for this object to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bnproto.failures import StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.bytes_in_flight import Account, BytesInFlight
from bnserver.core.events import ConnectionEnded, Contribute, Event, Join, Malformed, Pull, Push
from bnserver.core.quotas import QuotaError, Quotas
from bnserver.core.reasons import Reason
from bnserver.counts import Traffic
from bnserver.failpoints import Failpoints
from bnserver.rank_channel import Channel, Outgoing
from bnserver.translation import Reader

# A rank asks again when it has its answer. One that only asks must not fill the memory with answers.
_UNREAD = 64


class Connection:
    """One rank's connection.

    Args:
        number: names it in the core's events and effects; it is never used again.
        stream: the gRPC stream, on which it began.
        dispatch: takes the events.
        failpoints: faults to inject.
        quotas: in force.
        in_flight: the account of all connections.

    Attributes:
        channel: carries requests and answers: the stream, or a local socket that was attached to it.
        generation: of the job that its rank is in; 0 before all ranks have joined.
        is_over: whether the service has ended it.
        traffic: where its bytes are counted: among its job's, once all ranks have joined.
        account: of the bytes that are not answered yet.
    """

    def __init__(
        self,
        number: int,
        stream: Channel,
        dispatch: Callable[[Event], None],
        failpoints: Failpoints | None = None,
        quotas: Quotas | None = None,
        in_flight: BytesInFlight | None = None,
    ) -> None:
        self.number = number
        self.channel = stream
        self.generation = 0
        self.is_over = False
        self.traffic = Traffic()
        self._stream = stream
        self._dispatch = dispatch
        self._failpoints = failpoints or Failpoints()
        quotas = quotas or Quotas()
        self._reader = Reader(number, quotas)
        self.account = Account(in_flight or BytesInFlight(quotas))

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
        self.traffic.received += len(data)
        event = self._reader.read(request, data)
        if isinstance(event, Join):
            self.account.job = event.job
        if self.channel.unread > _UNREAD and isinstance(event, Contribute | Pull | Push):
            event = Malformed(
                self.number,
                f"expected a rank to read its answers before it asks again; {_UNREAD} are unread",
                None,
                Reason.QUOTA,
            )
        if self._failpoints.active:
            self._failpoints.reached("before-event")
        self._dispatch(event)

    def answer(self, messages: Sequence[Outgoing]) -> None:
        """Answer what the rank has asked."""
        self.channel.send(messages)
        self.traffic.sent += messages[0].payload_bytes
        self.account.release()

    def garbled(self, error: Exception) -> None:
        """A channel received bytes or messages that make no sense, or too many."""
        reason = Reason.QUOTA if isinstance(error, QuotaError) else Reason.INVALID
        self._dispatch(Malformed(self.number, str(error), reason=reason))

    def disconnected(self) -> None:
        """A channel has ended from the rank's side: the connection ends as a whole."""
        self._dispatch(ConnectionEnded(self.number))
        self.end(None)

    def end(self, status: StatusParts | None) -> None:
        """End it from the service's side, with an error or None; a second time does nothing."""
        self.is_over = True
        self.account.release()
        self._stream.close(status)
        self.channel.close(status)
