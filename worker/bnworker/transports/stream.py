"""A rank's stream to the statistics service: requests out, answers in, each within its time.

Laws of this room:
1. Every wait ends: with an answer, with the service's reason, or by the deadline.
2. What ends the stream ends it for good; later waits raise the same at once.
3. The caller's thread waits in a queue and nowhere else. Ctrl-C reaches it there, whereas an interrupt within gRPC
   can leave gRPC's locks taken, and then closing hangs (grpc issue 40834). A thread of the stream's own talks to
   gRPC.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Thread

import grpc

from bnlayer.errors import CollectiveError, ServiceError
from bnproto.arrays import Joining
from bnproto.channel import CLIENT_OPTIONS
from bnproto.failures import DETAILS_KEY, error_of, failure_in
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc

_PATIENCE_S = 2.0  # a service that listens answers sooner; then the log says what we wait for
_GOODBYE_S = 2.0  # how long leaving may take
_HANG_UP_S = 1.0  # how long closing the connection may take; then it is left to the process's end
_TURN_S = 0.2  # an interrupt that comes between Python's last look and the wait is seen this much later
# The service ends a wait at the deadline, and knows why; it gets this long to say so.
_LATE_S = 1.0

_log = logging.getLogger("bnworker")


class _Connected:
    """The connection stands."""


_Heard = pb.ExchangeResponse | _Connected | CollectiveError


class Stream:
    """One bidirectional stream.

    Args:
        address: of the service, HOST:PORT.
        timeout: seconds to wait for a connection, and afterwards for each answer.

    Raises:
        ServiceError: nobody listens there.
    """

    def __init__(self, address: str, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self._channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
        self._requests: SimpleQueue[pb.ExchangeRequest | None] = SimpleQueue()
        self._heard: SimpleQueue[_Heard] = SimpleQueue()
        self._error: CollectiveError | None = None
        self._ready = grpc.channel_ready_future(self._channel)
        self._responses: grpc.Call | None = None
        self._thread = Thread(target=self._listen, name="bnworker-stream", daemon=True)
        self._thread.start()
        try:
            self._connect()
        except BaseException:
            self.close(None)
            raise

    def send(self, request: pb.ExchangeRequest, parts: list[pb.Part] | None = None) -> None:
        """Send a request, and the parts of its payload."""
        self._requests.put(request)
        for part in parts or ():
            self._requests.put(pb.ExchangeRequest(part=part))

    def receive(self) -> pb.ExchangeResponse:
        """The next response.

        Raises:
            CollectiveError: what the service told us, or that it is gone, or late.
        """
        if self._error is not None:
            raise self._error.again()
        heard = self._hear(time.monotonic() + self._timeout + _LATE_S)
        if heard is None:
            heard = ServiceError(
                f"The service at {self._address} did not answer within {self._timeout:g} s. It may be frozen or cut "
                "off; if it is only slow, wait longer: timeout=."
            )
        if isinstance(heard, pb.ExchangeResponse):
            return heard
        assert isinstance(heard, CollectiveError)
        self._error = heard
        raise heard.again() from heard.__cause__

    def data(self, payload: pb.Payload) -> bytes | bytearray:
        """All bytes of a payload that was just received; its parts are received here.

        Raises:
            CollectiveError: as in `receive`.
        """
        joining = Joining(payload)
        while not joining.complete:
            joining.add(self.receive().part)
        return joining.data

    def close(self, reason: str | None) -> None:
        """Say goodbye and hang up; never raises. None hangs up without a goodbye."""
        if reason is not None and self._error is None:
            self.send(pb.ExchangeRequest(leave=pb.Leave(reason=reason)))
            deadline = time.monotonic() + _GOODBYE_S
            while isinstance(self._hear(deadline), pb.ExchangeResponse):
                pass  # an answer that nobody waits for any more
        self._error = self._error or ServiceError("This rank has left its job: join anew.")
        self._requests.put(None)
        self._ready.cancel()
        if self._responses is not None:
            self._responses.cancel()
        self._thread.join(_HANG_UP_S)

    def _connect(self) -> None:
        """Wait for the connection, which the stream's thread makes."""
        start = time.monotonic()
        if self._hear(start + min(_PATIENCE_S, self._timeout)) is not None:
            return
        _log.warning("nobody listens at %s yet; trying until %g s have passed (timeout=)", self._address, self._timeout)
        if self._hear(start + self._timeout) is None:
            raise ServiceError(
                f"No statistics service could be reached at {self._address} within {self._timeout:g} s. Check the "
                "address, and that the service runs there (bnlayer serve --listen HOST:PORT)."
            )

    def _hear(self, deadline: float) -> _Heard | None:
        """What the stream's thread has to say next; None if it says nothing until the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._heard.get(timeout=min(left, _TURN_S))
            except Empty:
                continue
        return None

    def _listen(self) -> None:
        """What the stream's thread does: everything that waits within gRPC."""
        requests: Iterator[pb.ExchangeRequest] = iter(self._requests.get, None)
        try:
            self._ready.result()
            self._heard.put(_Connected())
            responses = self._responses = rpc.StatisticsServiceStub(self._channel).Exchange(requests)
            try:
                for response in responses:
                    self._heard.put(response)
                self._heard.put(ServiceError(f"The service at {self._address} ended the exchange."))
            except grpc.RpcError as error:
                self._heard.put(self._explained(responses, error))
        except grpc.FutureCancelledError:
            pass  # nobody waits any more
        finally:
            self._channel.close()

    def _explained(self, call: grpc.Call, error: grpc.RpcError) -> CollectiveError:
        """What the service told us; or what is known where it could not."""
        for key, value in call.trailing_metadata() or ():
            failure = failure_in(value) if key == DETAILS_KEY and isinstance(value, bytes) else None
            if failure is not None:
                return error_of(failure)
        code, text = call.code(), call.details()
        if code is grpc.StatusCode.UNIMPLEMENTED:
            told = ServiceError(f"What listens at {self._address} is no statistics service: {text}.")
        else:
            told = ServiceError(
                f"The connection to the service at {self._address} broke ({code.name}: {text}). Look at the service's "
                "log; once it is back, start the job again."
            )
        told.__cause__ = error
        return told
