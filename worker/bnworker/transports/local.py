"""A rank's end of a local socket: its requests to the service on its own machine, and the answers, without gRPC.

Laws:
1. One thread receives at a time, and one sends; any thread may end it, and threads that wait then return at once.
2. After an error or an interrupt it is unknown which bytes were transferred: the socket is not used any more.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.answers import Answer, Whole

_ATTACH_S = 1.0  # a service that runs answers within a millisecond
_MOMENT_S = 0.001
_TIMEVAL = struct.Struct("ll")

_log = logging.getLogger("bnworker")


class LocalSocket:
    """One connection.

    Args:
        invitation: the address and the ticket.
        boot_id: of the service that sent it.

    Raises:
        OSError: nothing listens there, or it closes the connection.
        WireError: it is not that service.
    """

    def __init__(self, invitation: pb.LocalSocket, boot_id: int) -> None:
        self._frames = Frames()
        self._whole = Whole()
        self._over = False
        self._waits: dict[int, float] = {}
        self._sending, self._hearing = Lock(), Lock()  # held in a call that needs the socket open
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._patience(socket.SO_SNDTIMEO, _ATTACH_S)  # with many ranks the listener's backlog may be full
            self._socket.connect(f"\0{invitation.name}")
            self.send([pb.ExchangeRequest(attach=pb.Attach(ticket=invitation.ticket))], _ATTACH_S)
            answer = self.hear(_ATTACH_S)
            if answer is None or not answer.response.HasField("attached") or answer.response.boot_id != boot_id:
                raise WireError("expected the service to take it")
        except BaseException:
            self.end()
            raise

    def send(self, requests: Iterable[pb.ExchangeRequest], timeout: float) -> None:
        """Send requests.

        Args:
            requests: in this order, with nothing in between.
            timeout: seconds without progress after which it gives up.

        Raises:
            OSError: it has ended, or the service accepted nothing for so long.
        """
        try:
            with self._sending:
                for request in requests:
                    self._patience(socket.SO_SNDTIMEO, timeout)
                    self._socket.sendall(framed(request))
        finally:
            if self._over:
                self._close()

    def hear(self, timeout: float) -> Answer | None:
        """The next answer; None if nothing arrives for so many seconds.

        Raises:
            OSError: it has ended.
            WireError: what arrives is invalid.
        """
        try:
            with self._hearing:
                while True:
                    while (data := self._frames.next()) is not None:
                        answer = self._whole.add(_response(data))
                        if answer is not None:
                            return answer
                    self._patience(socket.SO_RCVTIMEO, timeout)
                    count = self._socket.recv_into(self._frames.room())
                    if not count:
                        raise ConnectionResetError("the service ended the local socket")
                    self._frames.received(count)
        except BlockingIOError:
            return None
        finally:
            if self._over:
                self._close()

    def end(self) -> None:
        """End it, from any thread, without waiting: a thread that uses it is woken, and closes it."""
        self._over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._close()

    def forget(self) -> None:
        """Close a forked child's copy; the parent's stays open. No lock is taken: a thread left behind may hold it."""
        self._socket.close()

    def _close(self) -> None:
        """Close it, unless it is in use."""
        if self._sending.acquire(blocking=False):
            try:
                if self._hearing.acquire(blocking=False):
                    try:
                        self._socket.close()
                    finally:
                        self._hearing.release()
            finally:
                self._sending.release()

    def _patience(self, option: int, seconds: float) -> None:
        """Set the kernel's timeout of one direction, so that a send does not change a receive's."""
        if self._waits.get(option) != seconds:
            self._waits[option] = seconds
            whole, part = divmod(round(1e6 * max(seconds, _MOMENT_S)), 1_000_000)  # 0 would mean for ever
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, part))


def _response(data: bytes) -> pb.ExchangeResponse:
    try:
        return pb.ExchangeResponse.FromString(data)
    except DecodeError as error:
        raise WireError(f"expected a response: {error}") from error


def attached(joined: pb.Joined, boot_id: int, address: str) -> LocalSocket | None:
    """A local socket for the rank that has just joined; None where it has to do without.

    Args:
        joined: the service's response to the join.
        boot_id: of the service.
        address: at which this rank reached it, HOST:PORT.
    """
    invitation = joined.local_socket
    if not joined.HasField("local_socket") or address.rpartition(":")[2] != str(invitation.port):
        return None
    try:
        return LocalSocket(invitation, boot_id)
    except (OSError, WireError) as error:
        _log.info("no local socket to the service at %s (%s): exchanges go over gRPC, more slowly", address, error)
        return None
