"""A connection's gRPC stream: the channel of ranks on other machines.

Every connection has one, for it is also the way on which a rank joins and leaves, and learns why a connection ends. A
thread of the client's listens to it; gRPC's own threads send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import grpc

from bnlayer.errors import CollectiveError, ServiceError
from bnproto.arrays import WireError
from bnproto.failures import error_in
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnworker.transports.service.events import Requests
from bnworker.transports.service.service_channel import Answer, AnswerAssembler


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a stream has ended, where the service did not say so."""

    code: str
    text: str


class GrpcChannel:
    """One stream.

    Args:
        address: of the service, HOST:PORT.
        requests: what is sent first.
        channel: to that address; it is closed when the stream ends.

    Attributes:
        stub: the service, on the same connection.
    """

    def __init__(self, address: str, requests: Requests, channel: grpc.Channel) -> None:
        self._address = address
        self._channel = channel
        self.stub = rpc.StatisticsServiceStub(self._channel)
        # A request and its parts are one entry: a signal handler that says goodbye does not come between them.
        self._requests: SimpleQueue[Requests | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()
        self._requests.put(requests)
        self._call = self.stub.Exchange(self._outgoing())

    def send(self, requests: Requests) -> None:
        """Send requests, as soon as the connection is made; never waits."""
        self._requests.put(requests)

    def receive(self, timeout: float) -> Answer | None:
        """The next answer; None if there is none for so many seconds.

        Raises:
            ConnectionResetError: the stream has ended.
        """
        try:
            answer = self._answers.get(timeout=timeout)
        except Empty:
            return None
        if answer is None:
            raise ConnectionResetError("the stream has ended")
        return answer

    def close(self) -> None:
        """End the stream, without a wait."""
        self._call.cancel()
        self._answers.put(None)

    def listen(self, joined: Callable[[pb.ExchangeResponse], None]) -> CollectiveError | Broken:
        """Receive until the stream ends; returns why it did.

        Args:
            joined: is called when the service says that all ranks have joined.
        """
        assembler = AnswerAssembler()
        try:
            for response in self._call:
                answer = assembler.add(response)
                if answer is None:
                    continue
                if response.HasField("joined"):
                    joined(response)
                else:
                    self._answers.put(answer)
            return Broken("OK", "the service ended the stream")
        except grpc.RpcError as error:
            return self._explained(error)
        except WireError as error:
            self._call.cancel()
            return Broken("INTERNAL", str(error))
        finally:
            self._answers.put(None)
            self._requests.put(None)
            self._channel.close()

    def _outgoing(self) -> Iterator[pb.ExchangeRequest]:
        while (requests := self._requests.get()) is not None:
            yield from requests

    def _explained(self, error: grpc.RpcError) -> CollectiveError | Broken:
        """The reason that the service gave; or what is known where it could not."""
        explained = error_in(self._call.trailing_metadata())
        if explained is not None:
            return explained
        code, text = self._call.code(), self._call.details()
        if code is grpc.StatusCode.UNIMPLEMENTED:
            refusal = ServiceError(f"What listens at {self._address} is no statistics service: {text}.")
            refusal.__cause__ = error
            return refusal
        return Broken(code.name, str(text))
