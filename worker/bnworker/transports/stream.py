"""A rank's stream to the statistics service: requests out, answers in, each within its time.

Laws of this room:
1. Every wait ends: with an answer, with the service's reason, or by the deadline.
2. What ends the stream ends it for good; later waits raise at once.
3. A thread that waits is the caller's own, so Ctrl-C reaches it. One other thread watches the deadline.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import NoReturn

import grpc

from bnlayer.errors import CollectiveError, ServiceError
from bnproto.arrays import Joining
from bnproto.channel import CLIENT_OPTIONS
from bnproto.failures import DETAILS_KEY, error_of, failure_in
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc

_PATIENCE_S = 2.0  # a service that listens answers sooner; then the log says what we wait for
_GOODBYE_S = 2.0  # how long leaving may take
# The service ends a wait at the deadline, and knows why; it gets this long to say so.
_LATE_S = 1.0

_log = logging.getLogger("bnworker")


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
        try:
            self._connect()
        except BaseException:
            self._channel.close()
            raise
        self._requests: SimpleQueue[pb.ExchangeRequest | None] = SimpleQueue()
        requests: Iterator[pb.ExchangeRequest] = iter(self._requests.get, None)
        self._responses = rpc.StatisticsServiceStub(self._channel).Exchange(requests)
        self._ended = Event()
        if not self._responses.add_callback(self._ended.set):
            self._ended.set()
        self._deadline = math.inf
        self._overdue = False
        Thread(target=self._watch, name="bnworker-deadline", daemon=True).start()

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
        self._deadline = time.monotonic() + self._timeout + _LATE_S
        try:
            return next(self._responses)
        except StopIteration:
            raise ServiceError(f"The service at {self._address} ended the exchange without a reason.") from None
        except grpc.RpcError as error:
            self._raise(error)
        finally:
            self._deadline = math.inf

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
        if reason is not None and not self._ended.is_set():
            self.send(pb.ExchangeRequest(leave=pb.Leave(reason=reason)))
            self._ended.wait(_GOODBYE_S)
        self._requests.put(None)
        self._responses.cancel()
        self._ended.set()
        self._channel.close()

    def _connect(self) -> None:
        start = time.monotonic()
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(min(_PATIENCE_S, self._timeout))
            return
        except grpc.FutureTimeoutError:
            pass
        _log.warning("nobody listens at %s yet; trying until %g s have passed (timeout=)", self._address, self._timeout)
        try:
            ready.result(max(0.0, start + self._timeout - time.monotonic()))
        except grpc.FutureTimeoutError:
            ready.cancel()
            raise ServiceError(
                f"No statistics service could be reached at {self._address} within {self._timeout:g} s. Check the "
                "address, and that the service runs there (bnlayer serve --listen HOST:PORT)."
            ) from None

    def _watch(self) -> None:
        # A deadline that is set while this thread sleeps lies at least one timeout ahead: nobody has to wake it.
        period = self._timeout + _LATE_S
        pause = period
        while not self._ended.wait(pause):
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._overdue = True
                self._responses.cancel()
                return
            pause = min(left, period)

    def _raise(self, error: grpc.RpcError) -> NoReturn:
        if self._overdue:
            raise ServiceError(
                f"The service at {self._address} did not answer within {self._timeout:g} s. It may be frozen or cut "
                "off; if it is only slow, wait longer: timeout=."
            ) from None
        told = self._told()
        if told is not None:
            raise told from None
        code, text = self._responses.code(), self._responses.details()
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise ServiceError(f"What listens at {self._address} is no statistics service: {text}.") from error
        raise ServiceError(
            f"The connection to the service at {self._address} broke ({code.name}: {text}). Look at the service's "
            "log; once it is back, start the job again."
        ) from error

    def _told(self) -> CollectiveError | None:
        for key, value in self._responses.trailing_metadata() or ():
            if key == DETAILS_KEY and isinstance(value, bytes):
                failure = failure_in(value)
                return error_of(failure) if failure is not None else None
        return None
