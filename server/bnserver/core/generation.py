"""One generation of a job: its ranks, from rendezvous to the end, and the one operation that they are in.

Laws:
1. A rank has at most one contribution outstanding; a contribution counts once, however often it arrives.
2. Integer limbs are added on arrival: the order can't be seen in the total.
3. The operation completes when every rank has said the same. When that can't happen any more (they differ, or one
   has left or is lost), every rank is told: at once if all have spoken or left, otherwise after a short grace, in
   which the others may still speak, so that the text says where each of them is.
4. A generation that failed is over: nobody can go on in it.
5. The latest answer is kept: a rank that did not get it asks again. Nobody can be further behind, since nobody can
   be further ahead.
6. After a restart of the service nothing is decided before all ranks are back. What they were answered says how far
   the generation was: plain operations leave no trace on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from bnlayer.agreement import Peer, Verdict, judge
from bnlayer.collective import Call, Operation
from bnlayer.errors import PeerLostError
from bnlayer.state import LayerState
from bnserver.core.answers import Answer
from bnserver.core.events import Body, Contribute, Limbs, Replacing
from bnserver.core.members import Member
from bnserver.core.validation import RefusedError

_GRACE_S = 0.4  # ranks that can't complete are told within 1 s: this, one tick, and the way there
_RANKS_SHOWN = 20  # of those that never came, which may be all of a large job
_SLOW_S = 2.0  # after which the log names those who keep the others waiting; then whenever the wait has doubled


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


class Receipt(Enum):
    """What a contribution is."""

    NEW = auto()
    REPEATED = auto()  # what the rank waits for
    ANSWERED = auto()  # what it should have the answer to
    HELD = auto()  # too early: other ranks are not back, or lack an answer that this one has


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


@dataclass(slots=True)
class PendingOperation:
    """The operation that the ranks are in: who has said what, since when."""

    calls: dict[int, Call] = field(default_factory=dict)
    bodies: dict[int, Body] = field(default_factory=dict)
    deadlines: dict[int, float] = field(default_factory=dict)
    limbs: Limbs | None = None
    state: LayerState | None = None
    agreed: bool = True
    doomed_since: float | None = None
    since: float = 0.0
    straggling_logged_s: float = 0.0

    @property
    def call(self) -> Call:
        """What all ranks say."""
        return next(iter(self.calls.values()))

    def add(self, rank: int, call: Call, body: Body, deadline: float) -> None:
        """Take a rank's contribution."""
        self.agreed = self.agreed and (not self.calls or call == self.call)
        self.calls[rank] = call
        self.deadlines[rank] = deadline
        if isinstance(body, Replacing):
            if rank == min(self.calls):  # they differ in nothing but their versions
                self.state = body.state
            body = body.limbs
        if not isinstance(body, np.ndarray):
            self.bodies[rank] = body
        elif self.limbs is None:
            self.limbs = body.copy()
        elif self.agreed and call.operation is Operation.PROBE:
            np.maximum(self.limbs, body, out=self.limbs)
        elif self.agreed:
            self.limbs += body


class Generation:
    """The ranks of a job from one rendezvous to the end.

    Attributes:
        number: from 1.
        world_size: how many ranks it has.
        members: those that have joined and are not gone, by rank.
        left: those that have gone, with the reason of their failure ("" for a clean end).
        running: whether all ranks have joined.
        recovering: whether the service was restarted, and not all ranks are back.
        over: whether it failed, or all have left.
        completed: operations so far.
        answer: what came of the last one.
        layer_answer: what came of the last one on a layer.
    """

    def __init__(self, number: int, world_size: int, *, recovering: bool = False) -> None:
        self.number = number
        self.world_size = world_size
        self.members: dict[int, Member] = {}
        self.left: dict[int, str] = {}
        self.running = self.recovering = recovering
        self.over = False
        self.completed = 0
        self.answer: Answer | None = None
        self.layer_answer: Answer | None = None
        self.pending = PendingOperation()
        self._peers: dict[int, Peer] = {}
        self._seen: dict[int, Call] = {}
        self._held: list[tuple[int, Contribute]] = []

    # ---- ranks come and go ----

    def joined(self, member: Member) -> None:
        """A rank is here for the first time; or was, when the service was killed."""
        self.members[member.peer.rank] = member
        self._peers[member.peer.rank] = member.peer
        self.running = self.running or len(self.members) == self.world_size

    def remove(self, rank: int, reason: str, since: float, *, silent: bool = False) -> None:
        """A rank has left, or is lost; the reason is empty for a clean end.

        Args:
            rank: which.
            reason: why it failed.
            since: when it was last heard of: the others' grace began then.
            silent: whether it said nothing itself: then the others are told where it was last seen.
        """
        if reason:
            seen = self._last_seen(rank) if silent else ""
            reason += f" ({seen})" if seen else ""
            doomed = self.pending.doomed_since
            self.pending.doomed_since = since if doomed is None else min(doomed, since)
        del self.members[rank]
        self.left[rank] = reason
        self.pending.calls.pop(rank, None)
        self.pending.deadlines.pop(rank, None)

    def due(self) -> list[tuple[int, Contribute]]:
        """What ranks said too early, and can be taken now; looks whether all of them are back."""
        if self.recovering:
            if any(member.stream is None for member in self.members.values()):
                return []
            self.recovering = False
            self.completed = max(self.completed, min((m.answered for m in self.members.values()), default=0))
        held, self._held = self._held, []
        self._held = [(rank, contribution) for rank, contribution in held if contribution.sequence > self.completed + 1]
        return [
            (rank, contribution)
            for rank, contribution in held
            if contribution.sequence <= self.completed + 1 and rank in self.members
        ]

    @property
    def departed(self) -> dict[int, Peer]:
        """Those that have gone, by rank."""
        return {rank: self._peers[rank] for rank in self.left}

    @property
    def layer_completed(self) -> int:
        """The number of the last operation on a layer."""
        return self.layer_answer.sequence if self.layer_answer is not None else 0

    @property
    def streams(self) -> dict[int, int]:
        """The connections of the ranks that are here, by rank."""
        return {rank: m.stream for rank, m in sorted(self.members.items()) if m.stream is not None}

    # ---- the operation ----

    def contribute(self, rank: int, contribution: Contribute, now: float) -> Receipt:
        """A rank contributes.

        Raises:
            RefusedError: it is in another generation, skips an operation, or repeats one with another content.
        """
        if contribution.generation != self.number or not self.running:
            state = "running" if self.running else "not complete yet"
            raise RefusedError(
                f"expected contributions to generation {self.number}, which is {state}; received one to "
                f"{contribution.generation}"
            )
        if self.recovering or self.completed + 1 < contribution.sequence <= self.members[rank].answered + 1:
            self._held.append((rank, contribution))
            return Receipt.HELD
        if contribution.sequence <= self.completed:
            return self._answered(rank, contribution)
        if contribution.sequence != self.completed + 1:
            raise RefusedError(
                f"expected contribution {self.completed + 1}, received contribution {contribution.sequence}"
            )
        if rank in self.pending.calls:
            if contribution.call == self.pending.calls[rank]:
                return Receipt.REPEATED
            raise RefusedError(
                f"expected nothing while contribution {contribution.sequence} waits for its answer, received another"
            )
        if not self.pending.calls:
            self.pending.since = now
        self._seen[rank] = contribution.call
        member = self.members[rank]
        member.answered = max(member.answered, self.completed)
        self.pending.add(rank, contribution.call, contribution.body, now + member.timeout)
        return Receipt.NEW

    def decide(self, now: float) -> Outcome:
        """What becomes of the operation."""
        failed = any(self.left.values())
        verdict = None if failed or self.recovering else self._overdue(now)
        if verdict is not None:
            return Outcome(Decision.ABORT, verdict, overdue=True)
        calls = self.pending.calls
        if not calls and not failed:
            return Outcome(Decision.WAIT)
        everybody = len(calls) + len(self.left) == self.world_size
        decision = _DECISIONS[self.pending.agreed and not self.left, everybody or not self.running]
        if decision is Decision.ABORT_SOON:
            since = self.pending.doomed_since
            self.pending.doomed_since = since = now if since is None else since
            decision = Decision.ABORT if now >= since + _GRACE_S else decision
        return Outcome(decision, self._verdict() if decision is Decision.ABORT else None)

    def finished(self, answer: Answer) -> None:
        """The operation is complete, and the next begins."""
        self.completed, self.answer, self.pending = answer.sequence, answer, PendingOperation()
        if answer.call.key.layer is not None:
            self.layer_answer = answer

    def straggling(self, now: float) -> str:
        """Who keeps the others waiting, and for how long; "" while that is not worth a line in the log."""
        waited = now - self.pending.since
        if not self.pending.calls or self.recovering or waited < max(_SLOW_S, 2 * self.pending.straggling_logged_s):
            return ""
        self.pending.straggling_logged_s = waited
        missing = self._missing(set(self.pending.calls) | set(self.left))
        names = "; ".join(f"{self._peers[rank]}, {self._last_seen(rank)}" for rank in missing[:_RANKS_SHOWN])
        more = f" and {len(missing) - _RANKS_SHOWN} more" if len(missing) > _RANKS_SHOWN else ""
        verb = "keeps" if len(missing) == 1 else "keep"
        others = len(self.pending.calls)
        return f"{names}{more}, {verb} {others} other{'s' * (others > 1)} waiting for {waited:.1f} s"

    # ---- words ----

    def _answered(self, rank: int, contribution: Contribute) -> Receipt:
        answer = self.answer
        if contribution.sequence <= self.members[rank].answered:
            return Receipt.REPEATED
        if answer is not None and contribution.sequence == answer.sequence:
            if contribution.call != answer.call:
                raise RefusedError(
                    f"expected contribution {contribution.sequence} as it was before, received another of this number"
                )
            return Receipt.ANSWERED
        raise RefusedError(
            f"expected contribution {self.completed + 1}, received contribution {contribution.sequence}, whose answer "
            "is not kept any more"
        )

    def _verdict(self) -> Verdict | None:
        return judge(self.pending.calls, self.left, self._peers)

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
        if not any(now >= deadline for deadline in self.pending.deadlines.values()):
            return None
        missing = self._missing(set(self.pending.calls) | set(self.left))
        timeout = min(self.members[rank].timeout for rank in self.pending.calls)
        names = "; ".join(
            f"{self._peers[rank]} did not take part within {timeout:g} s, {self._last_seen(rank)}" for rank in missing
        )
        waits = "; ".join(f"{self._peers[rank]} waits in {call.where}" for rank, call in self.pending.calls.items())
        return Verdict(
            PeerLostError,
            f"{names}; {waits}. Look at what it is doing; if it is only slow, wait longer: timeout=.",
            missing,
        )

    def _last_seen(self, rank: int) -> str:
        if not self.running:
            return ""
        seen = self._seen.get(rank) or (self.answer.call if self.answer is not None else None)
        how = "waiting in" if rank in self.pending.calls else "completing"
        return f"last seen {how} {seen.where}" if seen is not None else "last seen joining"

    def _missing(self, there: set[int]) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.world_size) if rank not in there)

    def _here(self) -> str:
        return ", ".join(str(member.peer) for _, member in sorted(self.members.items()))


def _ranks(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_RANKS_SHOWN])
    more = f" and {len(ranks) - _RANKS_SHOWN} more" if len(ranks) > _RANKS_SHOWN else ""
    return f"Rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
