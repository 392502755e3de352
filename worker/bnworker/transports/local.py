"""A rank's end of a local socket: what it asks the service on its own machine, and hears from it, without gRPC.

Laws of this room:
1. The caller's thread sends and receives here; any thread may end it, and whoever waits then hears so at once.
2. After an error or an interrupt nobody knows which bytes have come or gone: whoever sees one ends it.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock

from bnproto.arrays import WireError
from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.answers import Answer, Whole

_ATTACH_S = 1.0  # a service that runs answers within a millisecond
_MOMENT_S = 0.001  # 0 would mean not to wait at all, in another way

_log = logging.getLogger("bnworker")


class LocalSocket:
    """One connection.

    Args:
        invitation: where to, and the ticket.
        boot_id: of the service that sent it.

    Raises:
        OSError: nobody listens there, or it shows this rank out.
        WireError: it is not that service.
    """

    def __init__(self, invitation: pb.LocalSocket, boot_id: int) -> None:
        self._frames = Frames()
        self._whole = Whole()
        self._using = Lock()  # held while a call needs the socket to stay open
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_ATTACH_S)
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
            requests: in this order.
            timeout: seconds.

        Raises:
            OSError: it has ended, or not all was taken in time.
        """
        data = b"".join(framed(request) for request in requests)
        with self._using:
            self._socket.settimeout(timeout)
            self._socket.sendall(data)

    def hear(self, timeout: float) -> Answer | None:
        """The next answer; None if it is not there within so many seconds.

        Raises:
            OSError: it has ended.
            WireError: what comes makes no sense.
        """
        until = time.monotonic() + timeout
        with self._using:
            while True:
                while (data := self._frames.next()) is not None:
                    answer = self._whole.add(pb.ExchangeResponse.FromString(data))
                    if answer is not None:
                        return answer
                self._socket.settimeout(max(_MOMENT_S, until - time.monotonic()))
                try:
                    count = self._socket.recv_into(self._frames.room())
                except TimeoutError:
                    return None
                if not count:
                    raise ConnectionResetError("the service ended the local socket")
                self._frames.came(count)

    def end(self) -> None:
        """End it, from whichever thread."""
        self._shut()
        with self._using:
            self._socket.close()

    def _shut(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def attached(joined: pb.Joined, boot_id: int, address: str) -> LocalSocket | None:
    """A local socket for the rank that has just joined; None where it has to do without.

    Args:
        joined: what the service said.
        boot_id: of the service.
        address: at which this rank reached it, HOST:PORT.
    """
    invitation = joined.local_socket
    if not joined.HasField("local_socket") or address.rpartition(":")[2] != str(invitation.port):
        return None
    try:
        return LocalSocket(invitation, boot_id)
    except (OSError, WireError) as error:
        _log.debug("no local socket to the service at %s (%s): exchanges go over gRPC", address, error)
        return None
