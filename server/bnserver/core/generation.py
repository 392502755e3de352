"""One generation of a job: its ranks from rendezvous to the end, and one operation after the other.

An event of a rank comes down here once, and its effects go back once. Who is here is kept in `members`, what is being
gathered in `gathering`, how far it is in `progress`, and what is owned in `layers`; none of them knows of the others.

Laws:
1. Its phase changes as `PHASES` says, and in no other way. One that failed is over: no rank can go on in it.
2. A rank has at most one contribution outstanding.
3. After a restart of the service nothing is decided before all ranks are back. The last answers that they received
   show how far the generation was: plain operations are not journaled.
4. After a failure every rank gets the error once.
5. One of an elastic job begins with its ranks (`rendezvous`). Where a rank is lost, or ranks wait to join when all
   admit them, those that are left regroup (`RegroupError`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from bnlayer.agreement import Verdict, check_agreement
from bnlayer.collective import ADMIT, Call, Operation, PlainSignature
from bnlayer.errors import MismatchError, RegroupError, ServiceError
from bnlayer.state import LayerState
from bnserver.core import explanations
from bnserver.core.answers import DisagreementError, checkpoint, is_checkpoint, plain
from bnserver.core.effects import Closed, Effect, Failed, Joined, Owned, Persist, Record, Straggling
from bnserver.core.events import Contribute, Elastic, Join, Pull, Push, Replacing
from bnserver.core.gathering import Gathering, State
from bnserver.core.journal_records import Began, Completed, Ended, Left, MemberRecord
from bnserver.core.layers import Layers
from bnserver.core.members import LOST, LivenessTimeouts, Member, Membership, Sign
from bnserver.core.progress import Progress
from bnserver.core.reasons import REASON_OF, Reason
from bnserver.core.waiting import Waiting

SLOW_S = 2.0  # after which the log names the ranks that keep the others waiting; again whenever the wait has doubled


class Phase(Enum):
    """Where a generation is."""

    JOINING = auto()  # not all ranks have joined
    RUNNING = auto()
    RECOVERING = auto()  # the service was restarted, and not all ranks are back
    OVER = auto()


class Turn(Enum):
    """What takes a generation on."""

    ALL_JOINED = auto()
    ALL_BACK = auto()
    ENDS = auto()  # it failed, or all ranks have left


PHASES = {
    (Phase.JOINING, Turn.ALL_JOINED): Phase.RUNNING,
    (Phase.RECOVERING, Turn.ALL_BACK): Phase.RUNNING,
    (Phase.JOINING, Turn.ENDS): Phase.OVER,
    (Phase.RUNNING, Turn.ENDS): Phase.OVER,
    (Phase.RECOVERING, Turn.ENDS): Phase.OVER,
}


class Generation:
    """The ranks of a job from one rendezvous to the end.

    Args:
        job: the job's name.
        number: from 1.
        world_size: how many ranks it has.
        layers: what the job owns.
        timeouts: how long it waits for signs of life.
        recovering: whether it was running before the service was restarted.
        elastic: how many ranks the job may have; None: `world_size`.

    Attributes:
        phase: where it is.
        members: who is here.
        gathering: the operation that the ranks are in.
        progress: how far it is.
        ended: how it ended; None while it is not over.
        waiting: who has waited for whom.
        left: of an elastic job: how many ranks were connected, and not silent, when it ended, and go on.
        awaited: likewise: how many ranks wait to join.
    """

    def __init__(
        self,
        job: str,
        number: int,
        world_size: int,
        layers: Layers,
        timeouts: LivenessTimeouts,
        *,
        recovering: bool = False,
        elastic: Elastic | None = None,
    ) -> None:
        self.number = number
        self.world_size = world_size
        self.phase = Phase.RECOVERING if recovering else Phase.JOINING
        self.members = Membership(world_size)
        self.gathering = Gathering(world_size)
        self.progress = Progress()
        self.ended: Ended | None = None
        self.waiting = Waiting()
        self.elastic = elastic
        self.left = 0
        self.awaited = 0
        self._job = job
        self._layers = layers
        self._timeouts = timeouts
        self._held: list[tuple[int, Contribute]] = []  # too early: other ranks are away, or lack an answer

    def rank_on(self, connection: int) -> int:
        """The rank of a connection."""
        return next(rank for rank, each in self.members.connections.items() if each == connection)

    @property
    def is_running(self) -> bool:
        """Whether all ranks have joined, and it is not over."""
        return self.phase in (Phase.RUNNING, Phase.RECOVERING)

    # ---- ranks join and come back ----

    def joined(self, member: Member, now: float) -> list[Effect]:
        """Add a rank that joins."""
        self.members.add(member)
        if len(self.members.here) < self.world_size:
            return []
        self.phase = PHASES[self.phase, Turn.ALL_JOINED]
        self._layers.forget_unfinished()
        self.waiting.begin(now)
        for each in self.members.here.values():
            each.last_seen = now  # no lease was in force while the ranks were joining
        connections = tuple(self.members.connections.values())
        began = Record(self._job, self.began())
        if self.elastic is None:
            return [began, Joined(connections, self._job, self.number, self.world_size)]
        return [began, *(self._joined(rank, connection) for rank, connection in self.members.connections.items())]

    def returned(self, event: Join, now: float) -> list[Effect]:
        """A rank has reconnected; the end of the connection before may not have been noticed yet."""
        rank, resume = event.peer.rank, event.resume
        member = self.members.here[rank]
        effects: list[Effect] = [Closed(member.connection)] if member.connection is not None else []
        member.connect(event.connection, resume.answered if resume is not None and self.is_running else 0, now)
        if not self.is_running:
            return effects
        progress = self.progress
        if resume is not None and progress.is_behind(resume.layer_answered, resume.versions, self._layers.states):
            text = explanations.lost_answers(self._job, event.peer, resume.layer_answered, progress.layer_completed)
            return effects + self._abort(Verdict(ServiceError, text, ()), Reason.DATA_LOSS)
        effects.append(self._joined(rank, event.connection))
        return effects + self._take_held(now)

    def _joined(self, rank: int, connection: int) -> Joined:
        chosen = rank if self.elastic is not None else None
        return Joined((connection,), self._job, self.number, self.world_size, chosen)

    # ---- requests of ranks ----

    def contribute(self, rank: int, event: Contribute, now: float) -> list[Effect]:
        """A rank takes part in an operation, or repeats that it does."""
        member, sequence = self.members.here[rank], event.sequence
        if event.generation != self.number or self.phase is Phase.JOINING:
            state = "running" if self.is_running else "not complete yet"
            text = f"expected contributions to generation {self.number}, which is {state}; received one to "
            return self.refuse(rank, f"{text}{event.generation}", event.call, now)
        if self.phase is Phase.RECOVERING or self.progress.completed + 1 < sequence <= member.answered + 1:
            self._held.append((rank, event))
            return []
        if sequence != self.progress.completed + 1 or rank in self.gathering.calls:
            return self._repeated(rank, event, now)
        member.seen, member.answered = event.call, max(member.answered, self.progress.completed)
        self.gathering.add(rank, event.call, event.body, now, now + member.timeout)
        if self.gathering.state is State.COMPLETE:
            return self._complete(event.call, now)
        return [] if self.gathering.state is State.GATHERING else self._abort_if_due()

    def pull(self, rank: int, event: Pull, now: float) -> list[Effect]:
        """A rank asks for the owner's state of a layer."""
        del rank, now
        return [Owned(event.connection, self._layers.pulled(event.layer))]

    def push(self, rank: int, event: Push, now: float) -> list[Effect]:
        """A rank replaces the owner's state of a layer."""
        member = self.members.here[rank]
        if event.number and event.number <= member.pushes:
            return [Owned(event.connection, self._layers.pulled(event.layer))]
        try:
            pushed = self._layers.pushed(rank, event.number, event.layer, event.state)
        except DisagreementError as error:
            failed = Failed(event.connection, Reason.MISMATCH, str(error), (rank,), event.layer)
            reason = f"pushed what its owner refused: {str(error).rstrip('.')}"
            return [failed, *self.lose({rank: reason}, now)]
        self._layers.replace(pushed)
        member.pushes = event.number
        return [Record(self._job, pushed), Owned(event.connection, pushed.state)]

    def leave(self, rank: int, reason: str, now: float) -> list[Effect]:
        """A rank leaves."""
        if not self.is_running:
            reason = reason or "left before every rank had joined"
        connection = self.members.here[rank].connection
        closed = [Closed(connection, self._job)] if connection is not None else []
        # Saved before the leave is answered: when the last rank has its answer, the job is on disk.
        return [*self.lose({rank: reason}, now), *closed]

    def refuse(
        self, rank: int, text: str, call: Call | None, now: float, reason: Reason = Reason.INVALID
    ) -> list[Effect]:
        """A rank sent something invalid, or too much: remove it, and notify the others."""
        member = self.members.here[rank]
        failed: list[Effect] = []
        if member.connection is not None:
            layer, step = (call.key.layer, call.key.step) if call is not None else (None, None)
            message = f"The service refused what {member.peer} sent: {text}."
            failed.append(Failed(member.connection, reason, message, (rank,), layer, step))
        return [*failed, *self.lose({rank: f"sent what the service refused: {text}"}, now)]

    # ---- ranks are lost, and time passes ----

    def away(self, rank: int, now: float) -> list[Effect]:
        """A rank's connection broke: wait for it to reconnect, if it can."""
        member = self.members.here[rank]
        if not member.incarnation:
            return self.lose({rank: LOST}, now, silent=True)
        if self.phase is Phase.RECOVERING:  # other ranks are away as well: waiting longer for this one delays nobody
            member.disconnect(self._timeouts.return_s(member.incarnation, member.timeout), now, Sign.RESTARTS)
        else:
            member.disconnect(self._timeouts.away, now)
        return []

    def lose(self, reasons: Mapping[int, str], now: float, *, silent: bool = False) -> list[Effect]:
        """Remove ranks, each with a reason; "" for a clean end. Silent ones sent no leave themselves."""
        effects: list[Effect] = []
        for rank, reason in reasons.items():
            if silent and self.is_running:
                reason = f"{reason} ({self._seen(rank)})"  # noqa: PLW2901 - where it was last seen belongs to it
            # The others' grace began with its last sign of life: when it went away, or fell silent.
            self.gathering.depart(rank, self.members.here[rank].last_seen, now, failed=bool(reason))
            self.members.remove(rank, reason)
            if self.is_running:
                effects.append(Record(self._job, Left(self.number, rank, reason)))
        effects += self._abort_if_due()
        if not self.members.here and self.phase is not Phase.OVER:
            finished = self.elastic is not None and not any(self.members.left.values())
            text = explanations.finished(self._job)
            effects += self._end(Ended(self.number, Reason.FINISHED, text) if finished else Ended(self.number))
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Time has passed: decide which ranks are dead, and whether the others have waited for long enough."""
        lost = self.members.lost(now, self._timeouts.lease if self.is_running else 0.0)
        frozen = [
            (self.members.here[rank].peer, number) for rank, number in self.members.connections.items() if rank in lost
        ]
        effects = self.lose(lost, now, silent=True) if lost else self._wait(now)
        for peer, number in frozen:
            text = f"{peer} {lost[peer.rank]}. That is this process; the other ranks were told."
            reason = Reason.PEER_LOST if self.elastic is None else Reason.REGROUP
            effects.append(Failed(number, reason, text, (peer.rank,)))
        self.waiting.tick(now)
        waited = now - self.gathering.since
        is_slow = waited >= max(SLOW_S, 2 * self.gathering.straggling_logged_s)
        if self.phase is Phase.RUNNING and self.gathering.calls and is_slow:
            self.gathering.straggling_logged_s = waited
            text = explanations.straggling(self.members, self.gathering, self.progress.latest, waited)
            effects.append(Straggling(self._job, text))
        return effects

    def stop(self, text: str) -> list[Effect]:
        """The service shuts down: every rank gets an error."""
        return self._abort(Verdict(ServiceError, text, ()), Reason.STOPPING)

    # ---- for recovery ----

    def began(self) -> Began:
        """The record of its begin, with its ranks."""
        members = tuple(
            MemberRecord(m.peer, m.incarnation, m.timeout, m.pushes) for _, m in sorted(self.members.here.items())
        )
        return Began(self.number, self.world_size, members, self.elastic)

    # ---- what follows ----

    def _seen(self, rank: int) -> str:
        return explanations.seen(rank, self.members, self.gathering, self.progress.latest)

    def _repeated(self, rank: int, event: Contribute, now: float) -> list[Effect]:
        """A contribution with a number that is not the next one's, or of a rank that waits already."""
        waiting = self.gathering.calls.get(rank)
        response = self.progress.repeated(event.sequence, event.call, self.members.here[rank].answered, waiting)
        if isinstance(response, str):
            return self.refuse(rank, response, event.call, now)
        connections = self.members.connections
        return response.to({rank: connections[rank]}) if response is not None and rank in connections else []

    def _wait(self, now: float) -> list[Effect]:
        if self.phase is Phase.JOINING:
            if any(now >= member.join_deadline for member in self.members.here.values()):
                return self._abort(explanations.not_joined(self.members, self.world_size), Reason.DEADLINE)
            return []
        self.gathering.wait(now)
        return self._abort_if_due()

    def _abort_if_due(self) -> list[Effect]:
        """Abort the operation, if it is time."""
        if self.gathering.is_overdue:
            return self._abort(
                explanations.overdue(self.members, self.gathering, self.progress.latest), Reason.DEADLINE
            )
        if self.gathering.state is State.ABORTED or (self.phase is Phase.JOINING and self.members.left):
            verdict = check_agreement(self.gathering.calls, self.members.left, self.members.peers)
            assert verdict is not None
            return self._abort(verdict, REASON_OF[verdict.kind])
        return []

    def _complete(self, call: Call, now: float) -> list[Effect]:
        """Every rank has contributed the same call: compute the answer, record it, let the next operation begin."""
        done, sequence, record = self.gathering, self.progress.completed + 1, None
        if self.elastic is not None and self._admits(call, self.elastic):
            text = explanations.joiners(self._job, self.awaited)
            return self._abort(Verdict(RegroupError, text, ()), Reason.REGROUP)
        try:
            if is_checkpoint(call):
                answer = checkpoint(sequence, call, self._job, self._layers.states)
            elif isinstance(call.signature, PlainSignature):
                answer = plain(sequence, call, done.bodies)
            elif done.limbs is not None:
                body = done.limbs if done.replacing is None else Replacing(done.limbs, done.replacing)
                record = Completed(sequence, call, body)
                answer = self._layers.completed(record)
            else:
                seeds = {rank: body for rank, body in done.bodies.items() if isinstance(body, LayerState)}
                record = Completed(sequence, call, *self._layers.seeded(call, seeds))
                answer = self._layers.completed(record)
        except DisagreementError as error:
            return self._abort(Verdict(MismatchError, str(error), ()), Reason.MISMATCH)
        self.progress.finished(answer)
        self.waiting.completed(call, done.arrivals, now)
        self.gathering = Gathering(self.world_size)
        effects = answer.to(self.members.connections)
        if record is not None:
            effects.insert(0, Record(self._job, record))
        return effects + self._take_held(now) if self._held else effects

    def _admits(self, call: Call, elastic: Elastic) -> bool:
        """Whether ranks wait to join, there is a place, and all ranks are where they let others in."""
        if not self.awaited or len(self.members.here) >= elastic.maximum:
            return False
        signature = call.signature
        return call.operation is Operation.BARRIER and isinstance(signature, PlainSignature) and signature.op == ADMIT

    def _take_held(self, now: float) -> list[Effect]:
        """Take the contributions that came too early, if all ranks are back."""
        if self.phase is Phase.RECOVERING:
            if not self.members.all_connected:
                return []
            self.phase = PHASES[self.phase, Turn.ALL_BACK]
            self.waiting.begin(now)
            answered = min((member.answered for member in self.members.here.values()), default=0)
            self.progress.completed = max(self.progress.completed, answered)
        held, latest = self._held, self.progress.completed + 1
        self._held = [(rank, event) for rank, event in held if event.sequence > latest]
        effects: list[Effect] = []
        for rank, event in held:
            if event.sequence <= latest and rank in self.members.here and self.phase is not Phase.OVER:
                effects += self.contribute(rank, event, now)
        return effects

    def _abort(self, verdict: Verdict, reason: Reason) -> list[Effect]:
        """Send the error to every connected rank, and end the generation."""
        if self.elastic is not None and reason in (Reason.PEER_LOST, Reason.DEADLINE):
            text = f"{verdict.text} {explanations.regroup(self._job)}"
            verdict, reason = Verdict(RegroupError, text, verdict.ranks), Reason.REGROUP
        self.left = self.members.heard_lately(self._timeouts.lease) if reason is Reason.REGROUP else 0
        effects: list[Effect] = []
        for rank, connection in self.members.connections.items():
            call = self.gathering.calls.get(rank)
            layer, step = (call.key.layer, call.key.step) if call is not None else (None, None)
            effects.append(Failed(connection, reason, verdict.text, verdict.ranks, layer, step))
        return effects + self._end(Ended(self.number, reason, verdict.text, verdict.ranks))

    def _end(self, ended: Ended) -> list[Effect]:
        self.phase, self.ended = PHASES[self.phase, Turn.ENDS], ended
        return [Record(self._job, ended), Persist(self._job)]
