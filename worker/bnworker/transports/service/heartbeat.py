"""A rank's heartbeat: a thread of its own says at short intervals that the process is alive.

The main thread may hold Python's lock for seconds, again and again, on cores that others use too. So a heartbeat is
one call that needs the lock once: gRPC's own threads then send it. On the stream it would wait for the thread that
sends and the one that receives, each of which needs the lock. Where the lock is free for a moment only, one thread
gets it: this one, or the one that receives the answer to the heartbeat before. Whichever it is sends one if it is time.
For the same reason it decides by itself which connections to cut, and takes no lock of the session's.

A heartbeat that is not answered shows a connection that lets nothing through, though nobody has closed it. One that
another run of the service answers (its boot id says so) shows a connection to a service that knows no stream of this
rank's. Either is cut, and made anew. A heartbeat during which this process was held up itself shows nothing: a rank
that cut its connection and was held up again could not come back in time.
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

_PER_LEASE = 5  # a rank that is held up for half a lease is still alive
_ANSWERED_WITHIN = 0.5  # of a lease: the other half is for coming back
_HELD_UP = 2.0  # times the interval between two heartbeats that no thread of this module ran: the process could not
_FIRST_LEASE_S = 5.0  # until the service says how long its lease is: when all ranks have joined

Cut = Callable[[tuple[str, str]], None]
"""Ends a connection; gets the reason, a code and a text."""

_RESTARTED = ("RESTARTED", "another run of the service answers")


def _cut_off(seconds: float) -> tuple[str, str]:
    return "CUT_OFF", f"no heartbeat was answered for {seconds:g} s; this host is cut off, or the service is too slow"


@dataclass(frozen=True, slots=True)
class _Target:
    """The connection that heartbeats are sent on."""

    stub: rpc.StatisticsServiceStub
    boot_id: int | None
    cut: Cut


class Heartbeat:
    """One rank's heartbeat.

    Args:
        join: who this rank is.
    """

    def __init__(self, join: pb.Join) -> None:
        self._lease = _FIRST_LEASE_S
        self._request = pb.HeartbeatRequest(job=join.job, rank=join.rank, incarnation=join.incarnation)
        self._woken = Event()
        self._over = False
        self._last = 0.0
        self._ran = time.monotonic()
        self._held_up_until = 0.0
        self._target: _Target | None = None
        self._thread = Thread(target=self._run, name="bnworker-heartbeat", daemon=True)
        self._thread.start()

    def start(self, stub: rpc.StatisticsServiceStub, cut: Cut, joined: pb.ExchangeResponse | None = None) -> None:
        """Send heartbeats on a connection.

        Args:
            stub: the service on it.
            cut: ends it.
            joined: the service's response to the join: the run of the service that the connection leads to, and the
                seconds without a sign of life after which it takes this rank for frozen. None before it.
        """
        if joined is not None:
            self._lease = joined.joined.lease_ms / 1000 or _FIRST_LEASE_S
            if joined.joined.HasField("rank"):  # in an elastic job the service chooses it
                self._request.rank = joined.joined.rank
        self._target = _Target(stub, None if joined is None else joined.boot_id, cut)
        self._woken.set()  # the lease may be shorter than what it sleeps for

    def pause(self) -> None:
        """There is no connection."""
        self._target = None

    def stop(self) -> None:
        """The session is over."""
        self._over = True
        self._woken.set()

    def _run(self) -> None:
        while not self._over:
            self._send()
            self._woken.wait(self._lease / _PER_LEASE)
            self._woken.clear()

    def _send(self) -> None:
        """Send one, unless there was one just now."""
        target, now, lease = self._target, time.monotonic(), self._lease
        if now > self._ran + _HELD_UP * lease / _PER_LEASE:
            self._held_up_until = now
        self._ran = now
        if target is None or now < self._last + lease / _PER_LEASE / 2:
            return
        self._last = now
        try:
            future = target.stub.Heartbeat.future(self._request, timeout=lease * _ANSWERED_WITHIN)
        except ValueError:  # the channel was closed in this moment
            return
        future.add_done_callback(partial(self._answered, target, now, lease * _ANSWERED_WITHIN))

    def _answered(self, target: _Target, sent: float, limit: float, done: grpc.Future[pb.HeartbeatResponse]) -> None:
        """Cut a connection that lets nothing through, or leads to another run of the service."""
        self._send()
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            if target.boot_id not in (None, done.result().boot_id):
                target.cut(_RESTARTED)
        elif isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            if self._held_up_until > sent:
                return
            target.cut(_cut_off(limit))
