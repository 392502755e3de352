"""A connection's local socket: the channel of ranks on the service's own machine, without gRPC.

Laws of this room:
1. One thread receives at a time, and one sends; any thread may close it, and whoever waits then gets an error at once.
2. After an error or an interrupt nobody knows which bytes have been received or sent: it is not used any more.
3. A child process does not use its copy: it is closed there, and the parent's goes on.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from contextlib import suppress
from threading import Lock
from weakref import WeakSet

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.events import Requests
from bnworker.transports.service.service_channel import Answer, AnswerAssembler

_ATTACH_S = 1.0  # a service that runs answers within a millisecond
_MOMENT_S = 0.001
_TIMEVAL = struct.Struct("ll")

_log = logging.getLogger("bnworker")


class LocalChannel:
    """One local socket.

    Args:
        invitation: where to, and the ticket.
        boot_id: of the service that sent it.
        timeout: seconds for which the service may take nothing of what is sent.

    Raises:
        OSError: nobody listens there, or it refuses this rank.
        WireError: it is not that service.
    """

    def __init__(self, invitation: pb.LocalSocket, boot_id: int, timeout: float) -> None:
        self._timeout = _ATTACH_S
        self._frames = Frames()
        self._assembler = AnswerAssembler()
        self._closed = False
        self._waits: dict[int, float] = {}
        self._sending, self._receiving = Lock(), Lock()  # held in a call that needs the socket open
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._wait_at_most(socket.SO_SNDTIMEO, _ATTACH_S)  # a job of many ranks may have to queue
            self._socket.connect(f"\0{invitation.name}")
            self.send([pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))])
            answer = self.receive(_ATTACH_S)
            if answer is None or not answer.response.HasField("attached") or answer.response.boot_id != boot_id:
                raise WireError("expected the service to take it")
        except BaseException:
            self.close()
            raise
        self._timeout = timeout
        _channels.add(self)

    def send(self, requests: Requests) -> None:
        """Send requests, in this order, with nothing in between.

        Raises:
            OSError: it is closed, or the service took nothing for too long.
        """
        try:
            with self._sending:
                if self._waits.get(socket.SO_SNDTIMEO) != self._timeout:
                    self._wait_at_most(socket.SO_SNDTIMEO, self._timeout)
                for request in requests:
                    self._socket.sendall(framed(request))
        finally:
            if self._closed:
                self._release()

    def receive(self, timeout: float) -> Answer | None:
        """The next answer; None if there is none for so many seconds.

        Raises:
            OSError: it is closed.
            WireError: what was received makes no sense.
        """
        try:
            with self._receiving:
                while True:
                    while (data := self._frames.next()) is not None:
                        answer = self._assembler.add(_response(data))
                        if answer is not None:
                            return answer
                    if self._waits.get(socket.SO_RCVTIMEO) != timeout:
                        self._wait_at_most(socket.SO_RCVTIMEO, timeout)
                    count = self._socket.recv_into(self._frames.room())
                    if not count:
                        raise ConnectionResetError("the service ended the local socket")
                    self._frames.received(count)
        except BlockingIOError:
            return None
        finally:
            if self._closed:
                self._release()

    def close(self) -> None:
        """Close it, from whichever thread, without a wait: whoever uses it gets an error, and releases it."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._release()

    def _release(self) -> None:
        """Give the descriptor back, unless it is in use."""
        if self._sending.acquire(blocking=False):
            try:
                if self._receiving.acquire(blocking=False):
                    try:
                        self._socket.close()
                    finally:
                        self._receiving.release()
            finally:
                self._sending.release()

    def _wait_at_most(self, option: int, seconds: float) -> None:
        """How long the kernel waits, in one direction: what sends must not change what receives."""
        self._waits[option] = seconds
        full_seconds, microseconds = divmod(round(1e6 * max(seconds, _MOMENT_S)), 1_000_000)  # 0 would mean for ever
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(full_seconds, microseconds))


def _response(data: bytes) -> pb.ExchangeResponse:
    try:
        return pb.ExchangeResponse.FromString(data)
    except DecodeError as error:
        raise WireError(f"expected a response: {error}") from error


def attached(response: pb.ExchangeResponse, address: str, timeout: float) -> LocalChannel | None:
    """A local channel for the rank that has just joined; None where it has to do without.

    Args:
        response: the service's, to the join.
        address: at which this rank reached the service, HOST:PORT.
        timeout: seconds for which the service may take nothing of what is sent.
    """
    invitation = response.joined.local_socket
    if not response.joined.HasField("local_socket") or address.rpartition(":")[2] != str(invitation.port):
        return None
    try:
        return LocalChannel(invitation, response.boot_id, timeout)
    except (OSError, WireError) as error:
        _log.info("no local socket to the service at %s (%s): exchanges go over gRPC, more slowly", address, error)
        return None


_channels: WeakSet[LocalChannel] = WeakSet()


def _after_fork() -> None:
    """Close the child's copies. Threads that are not here may have held the locks."""
    for channel in _channels:
        channel._socket.close()  # noqa: SLF001 - its own module


os.register_at_fork(after_in_child=_after_fork)
