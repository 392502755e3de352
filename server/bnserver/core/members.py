"""The ranks of a generation: which are connected, which are away, and which have been silent for too long.

Laws:
1. A rank is connected (it has a stream), away (its stream broke, and it may reconnect), or lost.
2. Whatever a rank sends is a sign of life. A connected rank that gives none for a lease counts as frozen.
3. A slow rank is not a dead one: how long it computes between exchanges is not limited here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnlayer.agreement import Peer

LOST = "was lost: its connection broke without a goodbye"
_FROZEN = "was lost: it froze, without a sign of life for {:g} s"
_STAYED_AWAY = "was lost: it did not come back within {:g} s after the service was started again"


@dataclass(frozen=True, slots=True)
class LivenessTimeouts:
    """How long the service waits for signs of life.

    Attributes:
        lease: seconds without one after which a rank counts as frozen; 0: never.
        away: seconds that a rank whose connection broke may take to reconnect; a killed rank is noticed this late.
    """

    lease: float = 5.0
    away: float = 0.5

    def return_s(self, incarnation: int, timeout: float) -> float:
        """How long a rank may take to reconnect to a service that was restarted."""
        if not incarnation:
            return 0.0
        return min(self.lease, timeout) if self.lease else timeout


@dataclass(slots=True)
class Member:
    """A rank that has joined.

    Attributes:
        peer: how errors name it.
        timeout: seconds that it waits in one exchange.
        join_deadline: when it stops waiting for the others to join.
        incarnation: the random number of its process; 0: it does not reconnect.
        stream: its connection; None while it is away.
        last_seen: when it last gave a sign of life; while it is away, when its connection broke.
        away_until: when it counts as lost, if it is away.
        restarted: whether it is away because the service was restarted.
        answered: the last contribution whose answer it is known to have.
        pushes: how many it has made.
    """

    peer: Peer
    timeout: float
    join_deadline: float
    incarnation: int = 0
    stream: int | None = None
    last_seen: float = 0.0
    away_until: float = math.inf
    restarted: bool = False
    answered: int = 0
    pushes: int = 0

    def connect(self, stream: int, answered: int, now: float) -> None:
        """It has connected, on this stream."""
        self.stream, self.answered, self.last_seen = stream, answered, now
        self.away_until, self.restarted = math.inf, False

    def disconnect(self, until: float, now: float, *, restarted: bool = False) -> None:
        """Its stream broke; it may reconnect until `until`."""
        self.stream, self.last_seen, self.away_until, self.restarted = None, now, until, restarted

    def end(self, now: float, lease: float) -> str:
        """Why it counts as lost now; "" if it does not.

        Args:
            now: seconds.
            lease: in force; 0: none.
        """
        if self.stream is None and now >= self.away_until:
            return _STAYED_AWAY.format(self.away_until - self.last_seen) if self.restarted else LOST
        if self.stream is not None and lease and now >= self.last_seen + lease:
            return _FROZEN.format(lease)
        return ""
