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


class Unjoined:
    """Ends connections whose rank sends no join.

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
        late = f"Expected a join within {self._join_within_s:g} s of opening the stream, received none."
        timer = asyncio.get_running_loop().call_later(self._join_within_s, self._end, connection, late)
        self._timers[connection] = timer
        if len(self._timers) > self._most:
            text = (
                f"More than {self._most} streams are open whose ranks have not joined: the oldest is closed. Try again."
            )
            self._end(next(iter(self._timers)), text)

    def remove(self, connection: Connection) -> None:
        """Its rank has sent a join, or it has ended; more than once does nothing."""
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _end(self, connection: Connection, text: str) -> None:
        self.remove(connection)
        connection.end(status_of(pb.Failure(reason=pb.ERROR_REASON_QUOTA, text=text)))
