"""Streams that have not joined: few of them, and not for long.

Whoever reaches the port can open streams, and each costs memory and a file. A rank sends its join at once.
"""

from __future__ import annotations

import asyncio

from bnproto.failures import status_of
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection

JOIN_WITHIN_S = 5.0
MOST = 512  # at a time; all ranks of a large job may connect at once
_LATE = f"Expected a join within {JOIN_WITHIN_S:g} s of opening the stream, received nothing."
_TOO_MANY = f"More than {MOST} streams are open whose ranks have not joined: the oldest is closed. Try again."


class Unjoined:
    """Ends connections whose rank sends nothing.

    Args:
        join_within_s: seconds that each has.
        most: how many there may be; one more ends the oldest.
    """

    def __init__(self, join_within_s: float = JOIN_WITHIN_S, most: int = MOST) -> None:
        self._join_within_s = join_within_s
        self._most = most
        self._timers: dict[Connection, asyncio.TimerHandle] = {}  # the oldest first

    def add(self, connection: Connection) -> None:
        """A stream was opened."""
        timer = asyncio.get_running_loop().call_later(self._join_within_s, self._end, connection, _LATE)
        self._timers[connection] = timer
        if len(self._timers) > self._most:
            self._end(next(iter(self._timers)), _TOO_MANY)

    def remove(self, connection: Connection) -> None:
        """Its first message has arrived, or it has ended; more than once does nothing."""
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _end(self, connection: Connection, text: str) -> None:
        self.remove(connection)
        connection.end(status_of(pb.Failure(reason=pb.ERROR_REASON_QUOTA, text=text)))
