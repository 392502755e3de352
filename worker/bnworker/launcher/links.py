"""Connections between the launchers of one job: one message a line, JSON.

    node → node 0    hello, unable (it can't start its ranks), ended (a process), interrupted (it got a signal)
    node 0 → node    refused, start (the job's name, the service's address), signal, exit (the job's code)

A connection that breaks means that the launcher at its other end is gone; so does a host that answers nothing for
`_SILENT_S`, which the kernel finds out.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bnworker.launcher.reactor import Reactor, Sink

Message = dict[str, Any]

_SILENT_S = 5  # the service's lease: ranks on a host that is gone are given up after the same time
_LONGEST = 2**16  # no message is longer: it is no launcher that sends this


class Link:
    """A connection to another launcher.

    Args:
        reactor: waits for it.
        connection: connected; the link's own from now on.
        received: called with each message.
        disconnected: called once, when the other end is gone, or sends what is no message.
    """

    def __init__(
        self,
        reactor: Reactor,
        connection: socket.socket,
        received: Callable[[Link, Message], None],
        disconnected: Callable[[Link], None],
    ) -> None:
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, 1),
            (socket.TCP_KEEPINTVL, 1),
            (socket.TCP_KEEPCNT, _SILENT_S - 1),
            (socket.TCP_USER_TIMEOUT, _SILENT_S * 1000),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setblocking(False)
        self._reactor = reactor
        self._connection = connection
        self._received, self._disconnected = received, disconnected
        self._rest = b""
        self._writes_to = os.dup(connection.fileno())  # a descriptor is watched for one thing
        self._sink = Sink(reactor, self._writes_to, lambda: None)  # reading says that it is broken
        self._open = True
        reactor.watch(connection.fileno(), self._read)

    @property
    def sent(self) -> bool:
        """Whether every message has left."""
        return not self._open or self._sink.empty

    def send(self, **message: Any) -> None:
        """Send a message, soon."""
        if self._open:
            self._sink.put(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the connection, without a call of `disconnected`."""
        if self._open:
            self._open = False
            self._reactor.forget(self._connection.fileno())
            self._reactor.forget(self._writes_to)
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            os.close(self._writes_to)
            self._connection.close()

    def _read(self) -> None:
        try:
            chunk = self._connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:  # reset, or silent for too long
            chunk = b""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            message = _parsed(line)
            if message is None:
                chunk = b""
                break
            self._received(self, message)
        if self._open and (not chunk or len(self._rest) > _LONGEST):
            self.close()
            self._disconnected(self)


def _parsed(line: bytes) -> Message | None:
    with suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict) and isinstance(message.get("kind"), str):
            return message
    return None


class Listener:
    """Where launchers are waited for.

    Args:
        reactor: waits for them.
        host, port: where; of this machine.
        connected: called with each connection.

    Raises:
        OSError: nothing can listen there.
    """

    def __init__(self, reactor: Reactor, host: str, port: int, connected: Callable[[socket.socket], None]) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._reactor = reactor
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(address)
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._connected = connected
        reactor.watch(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        with suppress(OSError):  # it has gone already
            connection, _ = self._socket.accept()
            self._connected(connection)

    def close(self) -> None:
        """Wait for no more."""
        self._reactor.forget(self._socket.fileno())
        self._socket.close()
