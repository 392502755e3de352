"""Who is here: the ranks of a generation, which are connected, which are away, and which have ended.

Laws:
1. A member's presence changes as `PRESENCES` says, and in no other way.
2. Whatever a rank sends is a sign of life. A connected rank that gives none for a lease counts as frozen.
3. A slow rank is not a dead one: how long it computes between exchanges is not limited here.
4. That a rank is dead is decided in `Member.end`, when time passes. Two need no time: one that can't reconnect
   (`Generation.away`), and one whose place a new process takes while it is away (`Job._make_room`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from bnlayer.agreement import Peer
from bnlayer.collective import Call

LOST = "was lost: its connection broke without a goodbye"
_FROZEN = "was lost: it froze or was cut off, without a sign of life for {:g} s"
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


class Presence(Enum):
    """Whether a rank is here."""

    CONNECTED = auto()  # it has a connection
    AWAY = auto()  # it has none; it may connect, until a short time has passed
    RETURNING = auto()  # likewise, and longer: the service was restarted, and others are away as well
    ENDED = auto()  # it has left, or is lost


class Sign(Enum):
    """What happens to a rank."""

    CONNECTS = auto()
    BREAKS = auto()  # its connection
    RESTARTS = auto()  # likewise, or the service itself, while the generation recovers
    ENDS = auto()  # it leaves, or has been silent or away for too long


PRESENCES = {
    (Presence.CONNECTED, Sign.CONNECTS): Presence.CONNECTED,  # the end of the connection before was not noticed yet
    (Presence.CONNECTED, Sign.BREAKS): Presence.AWAY,
    (Presence.CONNECTED, Sign.RESTARTS): Presence.RETURNING,
    (Presence.CONNECTED, Sign.ENDS): Presence.ENDED,
    (Presence.AWAY, Sign.CONNECTS): Presence.CONNECTED,
    (Presence.AWAY, Sign.RESTARTS): Presence.RETURNING,
    (Presence.AWAY, Sign.ENDS): Presence.ENDED,
    (Presence.RETURNING, Sign.CONNECTS): Presence.CONNECTED,
    (Presence.RETURNING, Sign.ENDS): Presence.ENDED,
}


@dataclass(slots=True)
class Member:
    """A rank that has joined.

    Attributes:
        peer: how errors name it.
        timeout: seconds that it waits in one exchange.
        join_deadline: when it stops waiting for the others to join.
        incarnation: the random number of its process; 0: it does not reconnect.
        presence: whether it is here.
        connection: its number; None while it has none.
        last_seen: when it last gave a sign of life; while it is away, when its connection broke.
        away_until: when it counts as lost, if it is away.
        answered: the last contribution whose answer it is known to have.
        pushes: how many it has made.
        seen: the operation in which it was last seen.
    """

    peer: Peer
    timeout: float
    join_deadline: float
    incarnation: int = 0
    presence: Presence = Presence.AWAY
    connection: int | None = None
    last_seen: float = 0.0
    away_until: float = math.inf
    answered: int = 0
    pushes: int = 0
    seen: Call | None = None

    def connect(self, connection: int, answered: int, now: float) -> None:
        """It has connected; its connection has this number."""
        self.presence = PRESENCES[self.presence, Sign.CONNECTS]
        self.connection, self.answered, self.last_seen, self.away_until = connection, answered, now, math.inf

    def disconnect(self, window: float, now: float, sign: Sign = Sign.BREAKS) -> None:
        """It has no connection any more, and may connect again within so many seconds."""
        self.presence = PRESENCES[self.presence, sign]
        self.connection, self.last_seen, self.away_until = None, now, now + window

    def leave(self) -> None:
        """It has left, or is lost."""
        self.presence, self.connection = PRESENCES[self.presence, Sign.ENDS], None

    def end(self, now: float, lease: float) -> str:
        """Why it counts as lost now; "" if it does not.

        Args:
            now: seconds.
            lease: in force; 0: none.
        """
        if self.presence is Presence.CONNECTED:
            return _FROZEN.format(lease) if lease and now >= self.last_seen + lease else ""
        if now < self.away_until:
            return ""
        return LOST if self.presence is Presence.AWAY else _STAYED_AWAY.format(self.away_until - self.last_seen)


class Membership:
    """The ranks of a generation.

    Attributes:
        here: the ranks that have joined and neither left nor been lost, by rank; some may be away.
        left: why each of the others ended ("" for a clean end), by rank.
        peers: all that have ever joined, by rank.
    """

    def __init__(self, world_size: int) -> None:
        self.here: dict[int, Member] = {}
        self.left: dict[int, str] = {}
        self.peers: dict[int, Peer] = {}
        self._world_size = world_size

    @property
    def connections(self) -> dict[int, int]:
        """The connections of the connected ranks, by rank."""
        return {rank: m.connection for rank, m in sorted(self.here.items()) if m.connection is not None}

    def heard_lately(self, lease: float) -> int:
        """How many connected ranks gave a sign of life less than half a lease before the last that any of them gave.

        With a host all its ranks are lost, and the lease of one ends first.
        """
        signs = [member.last_seen for member in self.here.values() if member.connection is not None]
        since = max(signs, default=0.0) - (lease / 2 if lease else math.inf)
        return sum(sign > since for sign in signs)

    @property
    def all_connected(self) -> bool:
        """Whether no rank is away."""
        return all(member.connection is not None for member in self.here.values())

    @property
    def departed(self) -> dict[int, Peer]:
        """The ranks that have left or are lost, by rank."""
        return {rank: self.peers[rank] for rank in self.left}

    def add(self, member: Member) -> None:
        """A rank has joined."""
        self.here[member.peer.rank], self.peers[member.peer.rank] = member, member.peer

    def remove(self, rank: int, reason: str) -> None:
        """A rank has left or is lost; the reason is empty for a clean end."""
        self.here.pop(rank).leave()
        self.left[rank] = reason

    def lost(self, now: float, lease: float) -> dict[int, str]:
        """The ranks that count as lost now, and why."""
        ends = {rank: member.end(now, lease) for rank, member in sorted(self.here.items())}
        return {rank: reason for rank, reason in ends.items() if reason}

    def others(self, than: set[int]) -> Iterator[int]:
        """All ranks but some, whether they have joined or not."""
        return (rank for rank in range(self._world_size) if rank not in than)
