"""The listener of the local sockets: it matches those that connect with the connections that were invited.

Laws:
1. Any user of this machine can connect, and as often as the machine permits. What that costs is bounded: a few are
   accepted at a time, with a pause after them in which the ranks' messages are handled.
2. A socket is unattached until it presents a ticket. Only so many may be unattached at a time; beyond that, one of the
   user with the most of them is closed, so that no user can keep the sockets of another one's job out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import struct
from collections import defaultdict

from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.failpoints import Failpoints
from bnserver.local_channel import LocalChannel
from bnserver.rank_channel import Outgoing

_ATTACH_WITHIN_S = 5.0  # a socket that has sent no ticket by then is closed
_MOST_UNATTACHED = 512  # at a time; all ranks of a large job may connect at once
_BACKLOG = 4096  # ranks that connect at once, as all of a job do; the kernel takes less if its own limit is lower
# Accepting one takes some 0.1 ms. asyncio's own listener accepts up to a whole backlog before anything else has its
# turn: connecting without end then stopped every job of the service.
_TAKEN_AT_ONCE = 4
_ACCEPTED_AT_ONCE = 32  # those whose other end is closed already cost next to nothing
_PAUSE_S = 0.005  # 800 sockets a second: the ranks of a large job are in after a second or two
_NO_FILES_PAUSE_S = 1.0

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

_log = logging.getLogger("bnserver")


class LocalListener:
    """Accepts sockets.

    Args:
        boot_id: names this run of the service.
        failpoints: faults to inject.
        attach_within_s: seconds in which a socket must present its ticket.
    """

    def __init__(
        self, boot_id: int, failpoints: Failpoints | None = None, attach_within_s: float = _ATTACH_WITHIN_S
    ) -> None:
        self.failpoints = failpoints or Failpoints()
        self.attach_within_s = attach_within_s
        self._boot_id = boot_id
        self._name = ""
        self._port = 0
        self._socket: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._accepting: set[asyncio.Task[object]] = set()
        self._tickets: dict[bytes, Connection] = {}  # not presented yet
        self._invited: dict[Connection, bytes] = {}
        self._attached: set[LocalChannel] = set()
        self._unattached: defaultdict[int, dict[LocalChannel, None]] = defaultdict(dict)  # by user, the oldest first

    @property
    def attached(self) -> int:
        """How many sockets belong to a connection."""
        return len(self._attached)

    async def open(self, port: int) -> None:
        """Listen; where the machine has no such sockets, ranks stay on their streams.

        Args:
            port: that the service listens on.
        """
        name = f"bnserver-{secrets.token_hex(8)}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listening.bind(f"\0{name}")
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            _log.warning("no local sockets (%s): ranks on this machine exchange over gRPC", error)
            return
        self._socket, self._name, self._port = listening, name, port
        self._resume()

    async def close(self) -> None:
        """Listen no more, and end every socket."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._pause is not None:
            self._pause.cancel()
        if self._accepting:
            await asyncio.wait(self._accepting)
        unattached = [channel for channels in self._unattached.values() for channel in channels]
        for channel in (*self._attached, *unattached):
            channel.close(None)

    def invitation(self, connection: Connection) -> pb.LocalSocket | None:
        """The address and ticket for a connection's rank; None where there are no local sockets."""
        if not self._name:
            return None
        ticket = secrets.token_bytes(16)
        self._tickets[ticket], self._invited[connection] = connection, ticket
        return pb.LocalSocket(name=self._name, ticket=ticket, port=self._port)

    def revoke(self, connection: Connection) -> None:
        """A connection has ended: its ticket is no longer valid."""
        self._tickets.pop(self._invited.pop(connection, b""), None)

    # ---- called by a socket ----

    def connected(self, channel: LocalChannel) -> None:
        """A socket has connected."""
        self._unattached[channel.user][channel] = None
        if sum(map(len, self._unattached.values())) > _MOST_UNATTACHED:
            most = max(self._unattached.values(), key=len)
            next(iter(most)).close(None)

    def attach(self, channel: LocalChannel, ticket: bytes) -> Connection | None:
        """A socket presents a ticket; returns the connection that it belongs to, or None for an invalid ticket."""
        connection = self._tickets.pop(ticket, None)
        if connection is None or connection.is_over:
            return None
        self._remove_unattached(channel)
        self._attached.add(channel)
        connection.channel = channel
        channel.send([Outgoing(pb.ExchangeResponse(boot_id=self._boot_id, attached=pb.Attached()))])
        return connection

    def disconnected(self, channel: LocalChannel) -> None:
        """A socket has ended."""
        self._remove_unattached(channel)
        self._attached.discard(channel)

    def _remove_unattached(self, channel: LocalChannel) -> None:
        channels = self._unattached[channel.user]
        channels.pop(channel, None)
        if not channels:
            del self._unattached[channel.user]

    # ---- called by the event loop ----

    def _resume(self) -> None:
        if self._socket is not None:
            self._pause = None
            asyncio.get_running_loop().add_reader(self._socket, self._accept, self._socket)

    def _accept(self, listening: socket.socket) -> None:
        """Some have connected: take a few of them."""
        loop = asyncio.get_running_loop()
        pause_s, taken = _PAUSE_S, 0
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("no more local sockets for %g s: %s", _NO_FILES_PAUSE_S, error)
                pause_s = _NO_FILES_PAUSE_S
                break
            accepted.setblocking(False)
            if _has_ended(accepted):
                accepted.close()
                continue
            self._take(accepted)
            taken += 1
            if taken == _TAKEN_AT_ONCE:
                break
        loop.remove_reader(listening)
        self._pause = loop.call_later(pause_s, self._resume)

    def _take(self, accepted: socket.socket) -> None:
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(lambda: LocalChannel(self, user), accepted))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)


def _has_ended(accepted: socket.socket) -> bool:
    """Whether the other end has closed it, and sent nothing."""
    try:
        return not accepted.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
