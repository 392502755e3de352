"""One connection of a rank to the service: a gRPC stream, and perhaps a local socket beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

import grpc

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.local import LocalSocket


@dataclass(slots=True, eq=False)
class Connection:
    """One connection: its queue of requests, and its gRPC call.

    Attributes:
        socket: carries requests and answers instead of the stream, where there is one.
        stands: whether all have joined, so that requests can be sent.
    """

    channel: grpc.Channel
    requests: SimpleQueue[pb.ExchangeRequest | None] = field(default_factory=SimpleQueue)
    call: grpc.Call | None = None
    socket: LocalSocket | None = None
    stands: bool = False
    _given_up: LocalSocket | None = None

    def say(self, requests: Iterable[pb.ExchangeRequest]) -> None:
        """Send requests on the stream."""
        for request in requests:
            self.requests.put(request)

    def give_up_socket(self) -> None:
        """Stop using it. It stays open: the service would take its end for that of the connection."""
        self._given_up, self.socket = self.socket or self._given_up, None

    def cut(self) -> None:
        """End it: threads that wait for it are woken."""
        if self.call is not None:
            self.call.cancel()
        self.end_sockets()

    def end_sockets(self) -> None:
        """End what belongs to it beside the stream."""
        for each in (self.socket, self._given_up):
            if each is not None:
                each.end()
