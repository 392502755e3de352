"""A rank's session with the statistics service: requests out, answers in, each with a deadline.

Laws:
1. Every wait ends: with an answer, with the service's error, or by the deadline.
2. A connection that breaks is made anew, and the session goes on where it was; the service may have been restarted
   meanwhile. An error from the service ends the session for good; later waits raise the same error.
3. The caller's thread waits in a queue, or for a local socket, and nowhere else. Ctrl-C reaches it there, whereas an
   interrupt within gRPC can leave gRPC's locks taken, and then closing hangs (grpc issue 40834). A separate thread
   calls gRPC.
4. Once all have joined, a connection's requests and answers go one way: over its local socket, if it has one, or else
   over the stream. The two end together; the reason is sent on the stream alone.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, RLock, Thread
from weakref import WeakSet

import grpc

from bnlayer.errors import CollectiveError, ServiceError
from bnproto.arrays import WireError
from bnproto.channel import CLIENT_OPTIONS
from bnproto.failures import DETAILS_KEY, error_of, failure_in
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnworker.transports.answers import Answer, Whole
from bnworker.transports.connection import Connection
from bnworker.transports.heart import Heart
from bnworker.transports.local import LocalSocket, attached
from bnworker.transports.memory import Memory

_PATIENCE_S = 2.0  # a service that listens answers sooner; after that the log names what we wait for
_GOODBYE_S = 2.0  # how long leaving may take
# How long it may take where the service is being restarted: others may need what only this rank can repeat.
_GOODBYE_IN_AN_OUTAGE_S = 20.0
_HANG_UP_S = 1.0  # how long closing the connection may take; then it is left to the process's end
_TURN_S = 0.2  # an interrupt that comes between Python's last look and the wait is seen this much later
# The service ends a wait at the deadline, and knows why; its error may arrive this much later.
_LATE_S = 1.0
# Between two attempts to connect. A broken connection is made anew at once: others wait for it.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
# A service that keeps nothing on disk, and whose port is closed, has lost its jobs: waiting for it is pointless.
_NOBODY_S = 0.5

_log = logging.getLogger("bnworker")


@dataclass(frozen=True, slots=True)
class _Broke:
    """Why a connection ended, where the service sent no error."""

    code: str
    text: str


class Stream:
    """One rank's session.

    Args:
        address: of the service, HOST:PORT.
        join: this rank's join request.
        timeout: seconds to wait for all ranks, and afterwards for each answer.
        local_socket: whether to exchange over a local socket where the service is on this machine.

    Raises:
        ServiceError: nothing listens there.
        CollectiveError: the service refuses, or not all ranks came in time.

    Attributes:
        memory: what this rank keeps across connections.
    """

    def __init__(self, address: str, join: pb.Join, timeout: float, *, local_socket: bool = True) -> None:
        self.memory = Memory(join)
        self._address = address
        self._timeout = timeout
        self._wants_socket = local_socket
        self._outage_s = timeout
        self._durable = True
        # Held while something changes in the memory or a connection; a signal handler may leave in the middle of that.
        self._changing = RLock()
        self._connection: Connection | None = None
        # None: look again where answers come from.
        self._heard: SimpleQueue[Answer | CollectiveError | None] = SimpleQueue()
        self._error: CollectiveError | None = None
        self._closing = Event()
        self._ended = Event()
        self._heart = Heart(join)
        self._thread = Thread(target=self._listen, name="bnworker-stream", daemon=True)
        self._thread.start()
        _streams.add(self)
        try:
            self.receive()
        except BaseException:
            self.close(None)
            raise

    @property
    def is_local(self) -> bool:
        """Whether the next request goes over a local socket instead of gRPC."""
        connection = self._connection
        return connection is not None and connection.socket is not None

    def ask(self, request: pb.ExchangeRequest, parts: list[pb.Part] | None = None) -> None:
        """Send a request and the parts of its payload; without a connection, it is sent on the next one."""
        requests = [request, *(pb.ExchangeRequest(part=part) for part in parts or ())]
        with self._changing:
            self.memory.asks(requests)
            connection = self._connection
            if connection is None or not connection.stands:
                if connection is not None and self.memory.leaves:
                    connection.say(self.memory.repetition())
                return
            if connection.socket is None:
                connection.say(requests)
                return
            where = connection.socket
        self._send(connection, where, requests)

    def receive(self) -> Answer:
        """The answer to the request.

        Raises:
            CollectiveError: the service's error, or that it is gone, or late.
        """
        if self._error is not None:
            raise self._error.again()
        heard = self._hear(time.monotonic() + self._timeout + _LATE_S)
        if self._error is not None:  # a signal handler has left meanwhile
            raise self._error.again()
        if heard is None:
            heard = ServiceError(
                f"The service at {self._address} did not answer within {self._timeout:g} s. It may be frozen or cut "
                "off; if it is only slow, wait longer: timeout=."
            )
        if isinstance(heard, Answer):
            return heard
        self._error = heard
        raise heard.again() from heard.__cause__

    def close(self, reason: str | None) -> None:
        """Leave and disconnect; never raises. None disconnects without a leave."""
        if reason is not None and self._error is None:
            with self._changing:
                if self.memory.asked and self._connection is not None:  # perhaps in the middle of a message
                    self._connection.give_up_socket()
            self.ask(pb.ExchangeRequest(leave=pb.Leave(reason=reason)))
            start = time.monotonic()
            while isinstance(self._hear(start + _GOODBYE_S), Answer):
                pass  # an answer that is not waited for any more
            stands = self._connection is not None and self._connection.stands
            if self._durable and not stands and not self._ended.is_set():
                while isinstance(self._hear(start + min(self._timeout, _GOODBYE_IN_AN_OUTAGE_S)), Answer):
                    pass
        self._error = self._error or ServiceError("This rank has left its job: join anew.")
        self._closing.set()
        self._heart.stop()
        with self._changing:
            if self._connection is not None:
                self._connection.cut()
        self._thread.join(_HANG_UP_S)
        # A wait of this thread, in which a signal handler came here, would go on without an end: Python's queue takes a
        # time that has passed meanwhile for none at all.
        self._heard.put(None)

    def _hear(self, deadline: float) -> Answer | CollectiveError | None:
        """The next item from the service or the stream's thread; None if none comes until the deadline or the end."""
        while (left := deadline - time.monotonic()) > 0 and not self._closing.is_set():
            turn = min(left, _TURN_S)
            connection = self._connection
            where = connection.socket if connection is not None else None
            heard: Answer | CollectiveError | None = None
            if connection is not None and where is not None and self._heard.empty():
                heard = self._hear_at(connection, where, turn)
            else:
                with suppress(Empty):
                    heard = self._heard.get(timeout=turn)
            if heard is not None:
                return heard
        return None

    def _hear_at(self, connection: Connection, where: LocalSocket, timeout: float) -> Answer | None:
        """The next answer on a connection's local socket; None if none arrives in time, or if it has ended."""
        try:
            answer = where.hear(timeout)
        except (OSError, WireError):
            self._ends(connection, where)
            return None
        if answer is None:
            return None
        with self._changing:
            # Where there is another connection by now, the request was repeated there, and will be answered there.
            news = self._connection is connection and self.memory.hears(answer.response)
        return answer if news else None

    def _send(self, connection: Connection, where: LocalSocket, requests: list[pb.ExchangeRequest]) -> None:
        try:
            where.send(requests, self._timeout)
        except OSError:
            self._ends(connection, where)

    def _ends(self, connection: Connection, where: LocalSocket) -> None:
        """A local socket has ended or is unusable: give up its connection, which the service then ends."""
        with self._changing:
            if connection.socket is where:
                connection.socket, connection.stands = None, False
        where.end()

    def _forked(self) -> None:
        """In a forked child of the rank: release its copies without sending. None of the rank's threads run here."""
        self._changing = RLock()
        connection, self._connection = self._connection, None
        if connection is not None and connection.socket is not None:
            connection.socket.forget()
        self._error = ServiceError(
            f"Process {os.getpid()} was forked from rank {self._heart.rank}, which has joined its job: a rank is one "
            "process. Make exchanges there, or start processes before joining."
        )

    # ---- the stream's thread: everything that waits within gRPC ----

    def _listen(self) -> None:
        """Make one connection after the other, until the session ends."""
        since, pause, told = time.monotonic(), _FIRST_PAUSE_S, False
        while not self._closing.is_set():
            heard_before = self._heart.answers
            ended = self._connected()
            if isinstance(ended, CollectiveError):
                self._end(ended)
                return
            if self._heart.answers != heard_before:  # it was established, and worked
                since, pause, told = time.monotonic(), _FIRST_PAUSE_S, False
            away = time.monotonic() - since
            if not self._durable and away >= _NOBODY_S and not _somebody_listens(self._address):
                self._outage_s = _NOBODY_S
            if away >= self._outage_s:
                self._end(self._gone(ended))
                return
            if not told and (self.memory.generation or away >= min(_PATIENCE_S, self._timeout)):
                told = True
                self._say_what_we_wait_for(ended)
            self._closing.wait(min(pause * random.uniform(0.5, 1.0), self._outage_s - away))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _end(self, error: CollectiveError) -> None:
        self._ended.set()
        self._heard.put(error)

    def _connected(self) -> CollectiveError | _Broke:
        """Run one connection from start to end; returns why it ended."""
        connection = Connection(grpc.insecure_channel(self._address, CLIENT_OPTIONS))
        stub = rpc.StatisticsServiceStub(connection.channel)
        try:
            with self._changing:
                connection.say([self.memory.joining()])
                if self.memory.leaves:
                    connection.say(self.memory.repetition())
                responses = connection.call = stub.Exchange(iter(connection.requests.get, None))
                self._connection = connection
            if self._closing.is_set():  # it was set before there was something to cut
                connection.cut()
            self._heart.beats(stub, None, connection.cut)
            try:
                whole = Whole()
                for response in responses:
                    answer = whole.add(response)
                    if answer is not None:
                        self._take(answer, stub, connection)
                return self._ended_by_service()
            except grpc.RpcError as error:
                return self._explained(responses, error)
            except WireError as error:
                connection.cut()
                return _Broke("INTERNAL", str(error))
        finally:
            with self._changing:
                self._connection = None
            connection.end_sockets()
            self._heart.rest()
            connection.requests.put(None)
            connection.channel.close()

    def _take(self, answer: Answer, stub: rpc.StatisticsServiceStub, connection: Connection) -> None:
        response = answer.response
        if response.HasField("joined"):
            self._durable = response.joined.durable
            if self.memory.generation:
                _log.warning("rank %d is back at the service at %s", self._heart.rank, self._address)
            self._heart.lease = response.joined.lease_ms / 1000
            self._heart.beats(stub, response.boot_id, connection.cut)
            self._stand(connection, response)
        self._heart.answers += 1
        with self._changing:
            news = self.memory.hears(response)
        if news:
            self._heard.put(answer)

    def _stand(self, connection: Connection, response: pb.ExchangeResponse) -> None:
        """All have joined: choose socket or stream for this connection, and repeat there what the service may lack."""
        where = attached(response.joined, response.boot_id, self._address) if self._wants_socket else None
        self._wants_socket = where is not None  # once is enough: each attempt may cost a connection
        with self._changing:
            connection.socket, connection.stands = where, True
            repeated = self.memory.repetition() if not self.memory.leaves else []  # the leave was sent already
            if where is None:
                connection.say(repeated)
        if where is not None:
            self._heard.put(None)
            if repeated:
                self._send(connection, where, repeated)

    def _ended_by_service(self) -> CollectiveError | _Broke:
        if self.memory.leaves:
            return ServiceError(f"The service at {self._address} let this rank go.")
        return _Broke("OK", "the service ended the stream")

    def _gone(self, broke: _Broke) -> ServiceError:
        if not self.memory.generation:
            return ServiceError(
                f"No statistics service could be reached at {self._address} within {self._timeout:g} s. Check the "
                "address, and that the service runs there (bnlayer serve --listen HOST:PORT)."
            )
        return ServiceError(
            f"The connection to the service at {self._address} broke, and could not be made anew within "
            f"{self._outage_s:g} s ({broke.code}: {broke.text}). Look at the service's log; once it is back, start the "
            "job again."
        )

    def _say_what_we_wait_for(self, broke: _Broke) -> None:
        if self.memory.generation:
            _log.warning(
                "rank %d: the connection to the service at %s broke (%s: %s); trying for %g s to come back",
                self._heart.rank,
                self._address,
                broke.code,
                broke.text,
                self._outage_s,
            )
        else:
            _log.warning(
                "nobody listens at %s yet; trying until %g s have passed (timeout=)", self._address, self._timeout
            )

    def _explained(self, call: grpc.Call, error: grpc.RpcError) -> CollectiveError | _Broke:
        """The service's error; or what is known where it sent none."""
        for key, value in call.trailing_metadata() or ():
            failure = failure_in(value) if key == DETAILS_KEY and isinstance(value, bytes) else None
            if failure is not None:
                return error_of(failure)
        code, text = call.code(), call.details()
        if code is grpc.StatusCode.UNIMPLEMENTED:
            told = ServiceError(f"What listens at {self._address} is no statistics service: {text}.")
            told.__cause__ = error
            return told
        return _Broke(code.name, str(text))


def _somebody_listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_NOBODY_S).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):  # no quick answer, or an invalid address: gRPC's own error says more
        return True
    return True


_streams: WeakSet[Stream] = WeakSet()


def _after_fork() -> None:
    for stream in _streams:
        stream._forked()  # noqa: SLF001 - its own module


os.register_at_fork(after_in_child=_after_fork)
