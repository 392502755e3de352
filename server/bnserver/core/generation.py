"""One generation of a job: its ranks, from rendezvous to the end, and the one operation that they are in.

Laws of this room:
1. A rank has at most one contribution outstanding; a contribution counts once, however often it arrives.
2. Integer words are added on arrival: the order can't be seen in the total.
3. The operation completes when every rank has said the same. When that can't happen any more (they differ, or one
   has left or is lost), every rank is told: at once if all have spoken or left, otherwise after a short grace, in
   which the others may still speak, so that the text says where each of them is.
4. A generation that failed is over: nobody can go on in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from bnlayer.agreement import Peer, Verdict, judge
from bnlayer.collective import Call, Operation
from bnlayer.errors import PeerLostError
from bnserver.core.events import Body, Contribute, Words
from bnserver.core.validation import RefusedError

_GRACE_S = 0.4  # ranks that can't complete are told within 1 s: this, one tick, and the way there
_RANKS_SHOWN = 20  # of those that never came, which may be all of a large job


class Decision(Enum):
    """What becomes of the operation."""

    WAIT = auto()
    COMPLETE = auto()
    ABORT_SOON = auto()
    ABORT = auto()


# (all who spoke say the same and nobody has left, nobody is left who could still speak)
_DECISIONS = {
    (True, True): Decision.COMPLETE,
    (True, False): Decision.WAIT,
    (False, True): Decision.ABORT,
    (False, False): Decision.ABORT_SOON,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A decision.

    Attributes:
        decision: what to do.
        verdict: why, if the operation is aborted.
        overdue: whether that is because a rank has waited for too long.
    """

    decision: Decision
    verdict: Verdict | None = None
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """A rank that has joined.

    Attributes:
        stream: its connection.
        peer: how errors name it.
        timeout: seconds that it waits in one exchange.
        join_deadline: when it stops waiting for the others to join.
    """

    stream: int
    peer: Peer
    timeout: float
    join_deadline: float


@dataclass(slots=True)
class Round:
    """The operation that the ranks are in: who has said what, since when."""

    calls: dict[int, Call] = field(default_factory=dict)
    bodies: dict[int, Body] = field(default_factory=dict)
    deadlines: dict[int, float] = field(default_factory=dict)
    words: Words | None = None
    agreed: bool = True
    doomed_since: float | None = None

    @property
    def call(self) -> Call:
        """What all ranks say."""
        return next(iter(self.calls.values()))

    def add(self, rank: int, call: Call, body: Body, deadline: float) -> None:
        """Take a rank's contribution."""
        self.agreed = self.agreed and (not self.calls or call == self.call)
        self.calls[rank] = call
        self.deadlines[rank] = deadline
        if not isinstance(body, np.ndarray):
            self.bodies[rank] = body
        elif self.words is None:
            self.words = body.copy()
        elif self.agreed and call.operation is Operation.PROBE:
            np.maximum(self.words, body, out=self.words)
        elif self.agreed:
            self.words += body


class Generation:
    """The ranks of a job from one rendezvous to the end.

    Attributes:
        number: from 1.
        world_size: how many ranks it has.
        members: those that are here, by rank.
        left: those that have gone, with the reason of their failure ("" for a clean end).
        running: whether all ranks have joined.
        over: whether it failed, or all have left.
        completed: operations so far.
    """

    def __init__(self, number: int, world_size: int) -> None:
        self.number = number
        self.world_size = world_size
        self.members: dict[int, Member] = {}
        self.left: dict[int, str] = {}
        self.running = False
        self.over = False
        self.completed = 0
        self.round = Round()
        self._peers: dict[int, Peer] = {}
        self._last: Call | None = None

    def joined(self, member: Member) -> None:
        """A rank is here."""
        self.members[member.peer.rank] = member
        self._peers[member.peer.rank] = member.peer
        self.running = len(self.members) == self.world_size

    def spoke(self, rank: int, contribution: Contribute, now: float) -> bool:
        """A rank contributes; returns False for a repetition of what it is waiting for.

        Raises:
            RefusedError: it is in another generation, or repeats or skips an operation.
        """
        if contribution.generation != self.number or not self.running:
            state = "running" if self.running else "not complete yet"
            raise RefusedError(
                f"expected contributions to generation {self.number}, which is {state}; received one to "
                f"{contribution.generation}"
            )
        if contribution.sequence != self.completed + 1:
            raise RefusedError(
                f"expected contribution {self.completed + 1}, received contribution {contribution.sequence}"
            )
        if rank in self.round.calls:
            if contribution.call == self.round.calls[rank]:
                return False
            raise RefusedError(
                f"expected nothing while contribution {contribution.sequence} waits for its answer, received another"
            )
        self.round.add(rank, contribution.call, contribution.body, now + self.members[rank].timeout)
        return True

    def gone(self, rank: int, reason: str) -> None:
        """A rank has left; the reason is empty for a clean end."""
        del self.members[rank]
        self.left[rank] = reason
        self.round.calls.pop(rank, None)
        self.round.deadlines.pop(rank, None)

    def decide(self, now: float) -> Outcome:
        """What becomes of the operation."""
        failed = any(self.left.values())
        verdict = None if failed else self._overdue(now)
        if verdict is not None:
            return Outcome(Decision.ABORT, verdict, overdue=True)
        calls = self.round.calls
        if not calls and not failed:
            return Outcome(Decision.WAIT)
        everybody = len(calls) + len(self.left) == self.world_size
        decision = _DECISIONS[self.round.agreed and not self.left, everybody or not self.running]
        if decision is Decision.ABORT_SOON:
            since = self.round.doomed_since
            self.round.doomed_since = since = now if since is None else since
            decision = Decision.ABORT if now >= since + _GRACE_S else decision
        return Outcome(decision, self._judged() if decision is Decision.ABORT else None)

    def finished(self) -> Round:
        """Close the completed operation and begin the next; returns the completed one."""
        done, self.round = self.round, Round()
        self._last = done.call
        self.completed += 1
        return done

    def _judged(self) -> Verdict | None:
        return judge(self.round.calls, self.left, self._peers)

    def _overdue(self, now: float) -> Verdict | None:
        """The verdict if some rank has waited for longer than it wants to."""
        if not self.running:
            late = [member for member in self.members.values() if now >= member.join_deadline]
            if not late:
                return None
            missing = self._missing(set(self.members))
            return Verdict(
                PeerLostError,
                f"{_ranks(missing)} of {self.world_size} did not join in time; {self._here()} waited. Start every "
                f"rank with the same job name and world size ({self.world_size}), or wait longer: timeout=.",
                missing,
            )
        if not any(now >= deadline for deadline in self.round.deadlines.values()):
            return None
        missing = self._missing(set(self.round.calls) | set(self.left))
        timeout = min(self.members[rank].timeout for rank in self.round.calls)
        seen = f"completing {_where(self._last)}" if self._last else "joining"
        names = ", ".join(str(self._peers[rank]) for rank in missing)
        waits = "; ".join(f"{self._peers[rank]} waits in {_where(call)}" for rank, call in self.round.calls.items())
        return Verdict(
            PeerLostError,
            f"{names} did not take part within {timeout:g} s, last seen {seen}; {waits}. Look at what it is doing; "
            "if it is only slow, wait longer: timeout=.",
            missing,
        )

    def _missing(self, there: set[int]) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank not in there)

    def _here(self) -> str:
        return ", ".join(str(member.peer) for _, member in sorted(self.members.items()))


def _where(call: Call) -> str:
    return str(call.place) if call.place.layer is not None else f"{call.operation} (number {call.place.step})"


def _ranks(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_RANKS_SHOWN])
    more = f" and {len(ranks) - _RANKS_SHOWN} more" if len(ranks) > _RANKS_SHOWN else ""
    return f"Rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
