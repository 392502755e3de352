"""A rank's heartbeat: a thread of its own signals at short intervals that the process is alive.

The main thread may hold Python's lock (the GIL) for seconds, again and again, on cores that others use too. So a
heartbeat is one call that needs the lock once: gRPC's own threads then send it. On the stream it would wait for the
sending and the receiving thread, each of which needs the lock. Where the lock is free for a moment only, one thread
gets it: this one, or the one that receives the previous heartbeat's answer. Either of them sends a heartbeat when due.

A heartbeat without an answer reveals a connection that is open but passes nothing; an answer from another run of the
service reveals that it was restarted. In both cases the connection is cut, and made anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread

import grpc

from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc

_BEATS = 5  # in a lease: a rank that is held up for half of it is still alive
_ANSWERED_WITHIN = 0.5  # of a lease: the other half is for coming back
_FIRST_LEASE_S = 5.0  # until the service announces its lease, when all ranks have joined


@dataclass(frozen=True, slots=True)
class _Body:
    """The connection that heartbeats are sent for."""

    stub: rpc.StatisticsServiceStub
    boot_id: int | None
    cut: Callable[[], None]


class Heart:
    """One rank's heartbeat.

    Args:
        join: who this rank is.

    Attributes:
        rank: whose heartbeat it is.
        answers: how many messages the service has sent on the stream.
        lease: seconds of silence after which the service declares this rank frozen; 0: never.
    """

    def __init__(self, join: pb.Join) -> None:
        self.rank = join.rank
        self.answers = 0
        self.lease = _FIRST_LEASE_S
        self._request = pb.HeartbeatRequest(job=join.job, rank=join.rank, incarnation=join.incarnation)
        self._woken = Event()
        self._over = False
        self._last = 0.0
        self._body: _Body | None = None
        self._thread = Thread(target=self._run, name="bnworker-heart", daemon=True)
        self._thread.start()

    def beats(self, stub: rpc.StatisticsServiceStub, boot_id: int | None, cut: Callable[[], None]) -> None:
        """Send heartbeats for a connection.

        Args:
            stub: the service on it.
            boot_id: the run of the service that it leads to; None while that is not known.
            cut: ends it.
        """
        self._body = _Body(stub, boot_id, cut)
        self._woken.set()  # the lease may be shorter than what it sleeps for

    def rest(self) -> None:
        """Pause: there is no connection."""
        self._body = None

    def stop(self) -> None:
        """Stop for good: the rank's session has ended."""
        self._over = True
        self._woken.set()

    def _run(self) -> None:
        while not self._over:
            self._beat()
            self._woken.wait((self.lease or _FIRST_LEASE_S) / _BEATS)
            self._woken.clear()

    def _beat(self) -> None:
        """One heartbeat, unless there was one just now."""
        body, now, lease = self._body, time.monotonic(), self.lease or _FIRST_LEASE_S
        if body is None or now < self._last + lease / _BEATS / 2:
            return
        self._last = now
        try:
            future = body.stub.Heartbeat.future(self._request, timeout=lease * _ANSWERED_WITHIN)
        except ValueError:  # the channel was closed in this moment
            return
        future.add_done_callback(partial(self._answered, body))

    def _answered(self, body: _Body, done: grpc.Future[pb.HeartbeatResponse]) -> None:
        """Cut a connection that passes nothing, or leads to another run of the service."""
        self._beat()
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            if body.boot_id not in (None, done.result().boot_id):
                body.cut()
        elif isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            body.cut()
