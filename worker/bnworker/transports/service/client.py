"""Does what a rank's session decides: threads, connections and waits, and no decisions.

1. The caller's thread sends and receives by itself on the connection's channel, and otherwise waits in a queue, never
   within gRPC: Ctrl-C reaches it there, whereas an interrupt within gRPC can leave gRPC's locks taken, and then closing
   hangs (grpc issue 40834). A thread of the client's own listens to gRPC, and makes one connection after the other.
2. What never waits (opening, cutting, sending on a stream) is done while the session's lock is held, so in the order in
   which it was decided. What may wait is done outside: the session knows by the connection's number what came too late.
3. A signal handler may leave in the middle of anything that the caller's thread does, a decision included.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event as Flag
from threading import RLock, Thread
from typing import Any
from weakref import WeakSet

from bnlayer.errors import ServiceError
from bnproto.arrays import WireError
from bnproto.connection import Connector
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.actions import (
    Action,
    CloseChannel,
    Deliver,
    HangUp,
    Open,
    Pause,
    Probe,
    Repeat,
    Send,
    SendOnStream,
    Wake,
    Warn,
)
from bnworker.transports.service.events import (
    Abandon,
    Ask,
    Begin,
    ChannelBroken,
    Disconnected,
    Event,
    Forked,
    Joined,
    Leave,
    OwnerVersion,
    PauseOver,
    Probed,
    Received,
    Refused,
    Repeated,
    TimedOut,
)
from bnworker.transports.service.grpc_channel import Broken, GrpcChannel
from bnworker.transports.service.heartbeat import Heartbeat
from bnworker.transports.service.local_channel import attached
from bnworker.transports.service.service_channel import Answer, Channel
from bnworker.transports.service.session import Session, State

_HANG_UP_S = 1.0  # how long closing the connection may take; then it is left to the process's end
_TURN_S = 0.2  # an interrupt that comes between Python's last look and the wait is seen this much later
_PROBE_S = 0.5  # how long finding out whether somebody listens may take

_log = logging.getLogger("bnworker")


@dataclass(slots=True, eq=False)
class Connection:
    """One connection to the service.

    Attributes:
        number: the session's.
        stream: how the rank joins and leaves, and learns why the connection ends.
        channel: what carries requests and answers once all have joined: the stream, or a way beside it.
        fault: why this side ended it: a code and a text, as of one that ended by itself; None: it did not.
    """

    number: int
    stream: GrpcChannel
    channel: Channel
    fault: tuple[str, str] | None = None

    def cut(self, fault: tuple[str, str] | None = None) -> None:
        """End it, from whichever thread."""
        self.fault = self.fault or fault
        self.stream.close()
        self.channel.close()


class Client:
    """One rank's connection to the service, made anew as often as the session says.

    Args:
        connector: connects to the service.
        join: how this rank takes its place.
        timeout: seconds to wait for all ranks, and afterwards for each answer.
        local_socket: whether to exchange over a local socket where the service is on this machine.

    Raises:
        ServiceError: no service listens there.
        CollectiveError: the service refuses, or not all ranks joined in time.

    Attributes:
        session: what decides.
    """

    def __init__(self, connector: Connector, join: pb.Join, timeout: float, *, local_socket: bool = True) -> None:
        self._address = connector.address
        self.session = Session(self._address, join, timeout, time.monotonic())
        self._connector = connector
        self._timeout = timeout
        self._wants_socket = local_socket
        self._connection: Connection | None = None
        # Held while the session decides, and what never waits is done; a signal handler may leave in the middle of it.
        self._lock = RLock()
        self._over = Flag()
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._heartbeat = Heartbeat(join)
        # What is done at once, with the lock held.
        self._at_once: dict[type[Action], Callable[[Any], None]] = {
            Open: self._open,
            SendOnStream: self._send_on_stream,
            CloseChannel: self._close_channel,
            HangUp: self._hang_up,
            Wake: self._wake,
        }
        self._thread = Thread(target=self._run, name="bnworker-stream", daemon=True)
        self._thread.start()
        _clients.add(self)
        try:
            deadline = time.monotonic() + self.session.answer_within
            while not self.session.generation:
                if self.session.error is not None:
                    raise self.session.error.copy_for_raise() from self.session.error.__cause__
                self._take_turn(deadline)
        except BaseException:
            self.close(None)
            raise

    def request(self, request: pb.ExchangeRequest, parts: Sequence[pb.Part]) -> Answer:
        """Ask for something, and wait for the answer.

        Args:
            request: one that is answered.
            parts: of its payload, beyond what it holds itself.

        Raises:
            CollectiveError: what the service said of a failure, or that it is gone, or late.
        """
        requests = [request]
        if parts:
            requests += [pb.ExchangeRequest(part=part) for part in parts]
        for action in self._handle(Ask(requests)):
            if isinstance(action, Send):
                self._send(action)
        deadline = time.monotonic() + self.session.answer_within
        answer = None
        while answer is None:
            if self.session.error is not None:
                raise self.session.error.copy_for_raise() from self.session.error.__cause__
            answer = self._take_turn(deadline)
        return answer

    def note_version(self, layer: str, version: int) -> None:
        """The owner's version of a layer, as a pull or a push was answered with."""
        self._handle(OwnerVersion(layer, version))

    def close(self, reason: str | None) -> None:
        """Leave, and close the connection; never raises. None closes it without a leave."""
        if reason is not None:
            self._handle(Leave(reason))
        while self.session.state is State.LEAVING:
            self._take_turn(self.session.goodbye.answer_by)
        self._handle(Abandon())
        if self._connection is not None and not self._over.is_set():  # an interrupt came before it was done
            self._hang_up(HangUp())
        self._thread.join(_HANG_UP_S)
        # A wait of this thread, in which a signal handler came here, would go on without an end: Python's queue takes a
        # time that has passed meanwhile for none at all.
        self._woken.put(None)

    # ---- what the caller's thread does ----

    def _take_turn(self, deadline: float) -> Answer | None:
        """Wait for the next answer, or for a change of the session's; None after a while, or if there is none."""
        left = deadline - time.monotonic()
        if left <= 0:
            for action in self._handle(TimedOut()):
                if isinstance(action, Warn):
                    _log.warning("%s", action.text)
            return None
        turn, connection = min(left, _TURN_S), self._connection
        if self.session.state is not State.ACTIVE or connection is None:
            with suppress(Empty):
                self._woken.get(timeout=turn)
            return None
        try:
            answer = connection.channel.receive(turn)
        except (OSError, WireError):
            self._handle(ChannelBroken(connection.number))
            return None
        if answer is not None:
            for action in self._handle(Received(connection.number, answer)):
                if isinstance(action, Deliver):
                    return action.answer
        return None

    def _forked(self) -> None:
        """This process is a child of the rank, and must not speak for it. None of its threads run here."""
        self._lock = RLock()
        self._connection = None
        self.session.handle(Forked(os.getpid()), time.monotonic())

    # ---- what both threads do ----

    def _handle(self, event: Event) -> list[Action]:
        """Let the session decide, and do at once what never waits; returns all that it wants done."""
        with self._lock:
            actions = self.session.handle(event, time.monotonic())
            for action in actions:
                act = self._at_once.get(type(action))
                if act is not None:
                    act(action)
        return actions

    def _send(self, action: Send | Repeat) -> None:
        connection = self._connection
        if connection is None or connection.number != action.connection:
            return
        try:
            connection.channel.send(action.requests)
        except OSError:
            self._handle(ChannelBroken(connection.number))

    def _open(self, action: Open) -> None:
        stream = GrpcChannel(self._address, action.requests, self._connector.channel())
        connection = self._connection = Connection(action.connection, stream, stream)
        self._heartbeat.start(stream.stub, connection.cut)

    def _send_on_stream(self, action: SendOnStream) -> None:
        assert self._connection is not None
        assert self._connection.number == action.connection
        self._connection.stream.send(action.requests)

    def _close_channel(self, action: CloseChannel) -> None:
        assert self._connection is not None
        assert self._connection.number == action.connection
        self._connection.channel.close()

    def _hang_up(self, action: HangUp) -> None:
        del action
        self._over.set()
        self._heartbeat.stop()
        if self._connection is not None:
            self._connection.cut()
        self._woken.put(None)

    def _wake(self, action: Wake) -> None:
        del action
        self._woken.put(None)

    # ---- what the client's thread does: everything that waits within gRPC ----

    def _run(self) -> None:
        """One connection after the other, until the session ends."""
        event: Event | None = Begin()
        while event is not None:
            actions, event = self._handle(event), None
            for action in actions:
                match action:
                    case Open():
                        event = self._listen()
                    case Pause():
                        self._over.wait(action.seconds)
                        event = PauseOver()
                    case Probe():
                        event = Probed(_somebody_listens(self._address))
                    case Warn():
                        _log.warning("%s", action.text)

    def _listen(self) -> Disconnected | Refused:
        """One connection, until it ends."""
        connection = self._connection
        assert connection is not None
        try:
            ended = connection.stream.listen(lambda response: self._enter(connection, response))
        finally:
            self._heartbeat.pause()
            connection.channel.close()
        if isinstance(ended, Broken):
            # Once joined, it goes on trying: certificates may be in the middle of a renewal.
            fault = self._connector.fault() if ended.code == "UNAVAILABLE" and not self.session.generation else None
            if fault is not None:
                return Refused(connection.number, ServiceError(fault))
            code, text = connection.fault or (ended.code, ended.text)
            return Disconnected(connection.number, code, text, random.random())
        return Refused(connection.number, ended)

    def _enter(self, connection: Connection, response: pb.ExchangeResponse) -> None:
        """All have joined: decide what carries requests and answers, and go on there."""
        self._heartbeat.start(connection.stream.stub, connection.cut, response)
        if self._wants_socket:
            local = attached(response, self._address, self._timeout)
            connection.channel = local or connection.stream
            self._wants_socket = local is not None  # once is enough: each attempt may cost a connection
        joined = response.joined
        chosen = (joined.rank, joined.world_size) if joined.HasField("rank") else (None, None)
        event: Event | None = Joined(connection.number, response.generation, joined.durable, *chosen)
        while event is not None:
            actions, event = self._handle(event), None
            for action in actions:
                if isinstance(action, Send | Repeat):
                    self._send(action)
                if isinstance(action, Repeat):
                    event = Repeated(connection.number)
                if isinstance(action, Warn):
                    _log.warning("%s", action.text)


def _somebody_listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):  # whoever it is takes its time, or the address is none: gRPC says more
        return True
    return True


_clients: WeakSet[Client] = WeakSet()


def _after_fork() -> None:
    for client in _clients:
        client._forked()  # noqa: SLF001 - its own module


os.register_at_fork(after_in_child=_after_fork)
