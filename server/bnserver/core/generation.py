"""One generation of a job: its ranks, from rendezvous to the end, and their one pending operation.

Laws:
1. A rank has at most one contribution outstanding; a contribution counts once, however often it arrives.
2. Integer limbs are added on arrival: the total does not depend on the order.
3. The operation completes when every rank has sent the same call. When that can't happen any more (calls differ, or a
   rank has left or is lost), every rank gets the error: at once if all have called or left, otherwise after a short
   grace, in which the others may still call, so that the text can name where each of them is.
4. A generation that failed is over: no rank can go on in it.
5. Only the latest answer is kept, for a rank that did not get it and asks again. No rank can be further behind,
   because the next operation completes only with all of them.
6. After a restart of the service nothing is decided before all ranks are back. The last answers that they received
   show how far the generation was: plain operations are not journaled.
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

_GRACE_S = 0.4  # ranks get an error within 1 s: this, one tick, and the network
_RANKS_SHOWN = 20  # of those that never joined, which may be all of a large job
_SLOW_S = 2.0  # after which the log names the ranks that keep the others waiting; again whenever the wait has doubled


class Decision(Enum):
    """Whether an operation completes, aborts or goes on waiting."""

    WAIT = auto()
    COMPLETE = auto()
    ABORT_SOON = auto()
    ABORT = auto()


# (all calls so far are equal and no rank has left, every rank has called or left)
_DECISIONS = {
    (True, True): Decision.COMPLETE,
    (True, False): Decision.WAIT,
    (False, True): Decision.ABORT,
    (False, False): Decision.ABORT_SOON,
}


class Receipt(Enum):
    """How a contribution relates to the pending operation."""

    NEW = auto()
    REPEATED = auto()  # the rank waits for it already
    ANSWERED = auto()  # answered before: the answer is sent again
    HELD = auto()  # too early: other ranks have not reconnected, or lack an answer that this one has


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
    """The operation that the ranks are in: each one's call, and since when it waits."""

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
        """The call of all ranks."""
        return next(iter(self.calls.values()))

    def add(self, rank: int, call: Call, body: Body, deadline: float) -> None:
        """Take a rank's contribution."""
        self.agreed = self.agreed and (not self.calls or call == self.call)
        self.calls[rank] = call
        self.deadlines[rank] = deadline
        if isinstance(body, Replacing):
            if rank == min(self.calls):  # they differ only in their versions
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
        members: ranks that have joined and not left, by rank.
        left: ranks that have left or are lost, with the reason of their failure ("" for a clean end).
        running: whether all ranks have joined.
        recovering: whether the service was restarted, and not all ranks are back.
        over: whether it failed, or all have left.
        completed: operations so far.
        answer: of the last one.
        layer_answer: of the last one on a layer.
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

    # ---- ranks join and leave ----

    def joined(self, member: Member) -> None:
        """Add a rank: one that joins, or one that a recovered journal names."""
        self.members[member.peer.rank] = member
        self._peers[member.peer.rank] = member.peer
        self.running = self.running or len(self.members) == self.world_size

    def remove(self, rank: int, reason: str, since: float, *, silent: bool = False) -> None:
        """A rank has left, or is lost; the reason is empty for a clean end.

        Args:
            rank: which.
            reason: why it failed.
            since: when it was last seen: the others' grace began then.
            silent: whether it sent no leave itself: then the error says where it was last seen.
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
        """The contributions that came too early and can be taken now; checks whether all ranks are back."""
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
        """The ranks that have left or are lost, by rank."""
        return {rank: self._peers[rank] for rank in self.left}

    @property
    def layer_completed(self) -> int:
        """The number of the last operation on a layer."""
        return self.layer_answer.sequence if self.layer_answer is not None else 0

    @property
    def streams(self) -> dict[int, int]:
        """The streams of the connected ranks, by rank."""
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
        """Whether the operation completes, aborts or goes on waiting."""
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

    # ---- errors and log lines ----

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
        """The verdict if some rank has waited for longer than its timeout."""
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
