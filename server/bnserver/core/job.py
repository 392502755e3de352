"""One job: its generations one after the other, and the layers that outlive them.

Laws:
1. A job exists from its first join. Ranks that join while another generation ends begin the next one.
2. After a failure every rank gets the error once; the state stays, and the next join begins a new generation.
3. An invalid message ends its rank's membership, and never changes the state.
4. A rank that is away when the others get an error gets the same one when it reconnects.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnlayer.agreement import Verdict
from bnlayer.collective import Call, PlainSignature
from bnlayer.errors import MismatchError, ServiceError
from bnlayer.state import LayerState
from bnserver.core.answers import Answer, plain
from bnserver.core.effects import (
    ApplyUpdate,
    Closed,
    Effect,
    Enrolled,
    Failed,
    Joined,
    Owned,
    Persist,
    Record,
    Straggling,
    Totals,
)
from bnserver.core.events import Contribute, Join, Push, Replacing
from bnserver.core.generation import Decision, Generation, PendingOperation, Receipt
from bnserver.core.journal_records import Began, Completed, Ended, Left, MemberRecord
from bnserver.core.layers import DisagreementError, Layers
from bnserver.core.members import LOST, LivenessTimeouts, Member
from bnserver.core.reasons import REASON_OF, Reason
from bnserver.core.validation import RefusedError


class Job:
    """A job's generations and layers.

    Attributes:
        name: the job's.
        number: of the latest generation; 0 before the first.
        layers: the owner's state.
        generations: those that are not over, the latest last.
        ended: how the latest one that is over ended.
    """

    def __init__(self, name: str, timeouts: LivenessTimeouts) -> None:
        self.name = name
        self.number = 0
        self.layers = Layers()
        self.generations: list[Generation] = []
        self._timeouts = timeouts
        self.ended = Ended(0)

    # ---- ranks join and leave ----

    def join(self, event: Join, now: float) -> tuple[Generation | None, list[Effect]]:
        """A rank joins or reconnects; returns the generation that it is now in, None if it was refused."""
        effects: list[Effect] = []
        try:
            generation = self._of(event)
            if generation is not None:
                return generation, self._returned(generation, event, now)
            if event.resume is not None:
                return None, [self._stale(event)]
            effects = self._make_room(event, now)
            generation = self._gathering(event)
        except DisagreementError as error:
            failed = Failed(event.stream, Reason.MISMATCH, str(error), (event.peer.rank,))
            return None, [*effects, failed]
        member = Member(event.peer, event.timeout, now + event.join_timeout, event.incarnation)
        member.connect(event.stream, 0, now)
        generation.joined(member)
        if not generation.running:
            return generation, effects
        self.layers.forget_unfinished()
        for each in generation.members.values():
            each.last_seen = now  # no lease was in force while the ranks were joining
        joined = Joined(tuple(generation.streams.values()), self.name, generation.number, generation.world_size)
        return generation, [*effects, Record(self.name, began(generation)), joined]

    def away(self, generation: Generation, rank: int, now: float) -> list[Effect]:
        """A rank's connection broke: wait for it to reconnect, if it can."""
        member = generation.members[rank]
        if not member.incarnation:
            return self.lose(generation, {rank: LOST}, now, silent=True)
        window = self._timeouts.away
        if generation.recovering:  # other ranks are away as well, so waiting longer for this one delays nobody
            window = self._timeouts.return_s(member.incarnation, member.timeout)
        member.disconnect(now + window, now, restarted=generation.recovering)
        return []

    def leave(self, generation: Generation, rank: int, reason: str, now: float) -> list[Effect]:
        """A rank leaves."""
        if not generation.running:
            reason = reason or "left before every rank had joined"
        stream = generation.members[rank].stream
        closed = [Closed(stream)] if stream is not None else []
        # Saved before the leave is answered: when the last rank has its answer, the job is on disk.
        return [*self.lose(generation, {rank: reason}, now), *closed]

    def lose(
        self, generation: Generation, reasons: Mapping[int, str], now: float, *, silent: bool = False
    ) -> list[Effect]:
        """Remove ranks, each with a reason; "" for a clean end. Silent ones sent no leave themselves."""
        effects: list[Effect] = []
        for rank, reason in reasons.items():
            # The others' grace began with its last sign of life: when it went away, or fell silent.
            generation.remove(rank, reason, generation.members[rank].last_seen, silent=silent)
            if generation.running:
                effects.append(Record(self.name, Left(generation.number, rank, generation.left[rank])))
        effects += self.resolve(generation, now)
        if not generation.members and not generation.over:
            effects += self._end(generation, Ended(generation.number))
        return effects

    def refuse(self, generation: Generation, rank: int, text: str, call: Call | None, now: float) -> list[Effect]:
        """A rank sent something invalid: remove it, and notify the others."""
        member = generation.members[rank]
        failed: list[Effect] = []
        if member.stream is not None:
            failed.append(
                Failed(
                    member.stream,
                    Reason.INVALID,
                    f"The service refused what {member.peer} sent: {text}.",
                    (rank,),
                    call.key.layer if call else None,
                    call.key.step if call else None,
                )
            )
        return [*failed, *self.lose(generation, {rank: f"sent what the service refused: {text}"}, now)]

    def _of(self, event: Join) -> Generation | None:
        """The generation that this very process is a member of already; None if there is none."""
        if not event.incarnation:
            return None
        for generation in self.generations:
            member = generation.members.get(event.peer.rank)
            if member is not None and member.incarnation == event.incarnation:
                return generation
        return None

    def _returned(self, generation: Generation, event: Join, now: float) -> list[Effect]:
        """A rank has reconnected on another stream; the end of the one before may not have been noticed yet."""
        rank = event.peer.rank
        member, known = generation.members[rank], event.resume
        effects: list[Effect] = [Closed(member.stream)] if member.stream is not None else []
        if not generation.running:
            member.connect(event.stream, 0, now)
            return effects
        member.connect(event.stream, known.answered if known is not None else 0, now)
        if known is not None and self._behind(generation, known.layer_answered, known.versions):
            text = (
                f"The service lost what the ranks of job {self.name!r} were told: {event.peer} knows of contribution "
                f"{known.layer_answered}, the service's state directory of {generation.layer_completed}. The machine "
                "lost its power, its disk was full, or the directory is an old copy. Start the job again, from its "
                "checkpoint."
            )
            return effects + self._abort(generation, Verdict(ServiceError, text, ()), Reason.DATA_LOSS)
        effects.append(Joined((event.stream,), self.name, generation.number, generation.world_size))
        return effects + self._go_on(generation, now)

    def _behind(self, generation: Generation, layer_answered: int, versions: Mapping[str, int]) -> bool:
        """Whether the owner lacks something that was answered to a rank."""
        if layer_answered != generation.layer_completed:
            # A rank that lacks an answer may know of a higher version, as ranks can set an earlier state. The owner
            # can't lack a push that this rank knows of: it came before the rank's contribution to that answer.
            return layer_answered > generation.layer_completed
        states = self.layers.states
        return any(name not in states or states[name].version < version for name, version in versions.items())

    def _stale(self, event: Join) -> Failed:
        """Why a rank can't reconnect."""
        assert event.resume is not None
        number, ended = event.resume.generation, self.ended
        if ended.generation == number and ended.reason is not None:
            return Failed(event.stream, ended.reason, ended.text, ended.ranks)
        if not self.number:
            why = "this service knows nothing of the job: it was started anew, without what it had kept (--state-dir)"
        else:
            why = f"that generation is over; the latest one is {self.number}"
        text = f"{event.peer} can't come back into generation {number} of job {self.name!r}: {why}. Start it again."
        return Failed(event.stream, Reason.STALE, text)

    def _make_room(self, event: Join, now: float) -> list[Effect]:
        """Remove a member that is away, as a new process joins with its rank: the old one can't reconnect any more."""
        effects: list[Effect] = []
        for generation in tuple(self.generations):
            member = generation.members.get(event.peer.rank)
            if member is not None and member.stream is None:
                effects += self.lose(generation, {event.peer.rank: LOST}, now, silent=True)
        return effects

    def _gathering(self, event: Join) -> Generation:
        """The generation that the rank can join: the latest, or a new one if that one is ending."""
        latest = self.generations[-1] if self.generations else None
        if latest is None or latest.left:
            self.number += 1
            latest = Generation(self.number, event.world_size)
            self.generations.append(latest)
            return latest
        rank, members = event.peer.rank, latest.members
        first = members[min(members)].peer
        if event.world_size != latest.world_size:
            raise DisagreementError(
                f"{event.peer} joins job {self.name!r} with world size {event.world_size}, but {first} joined it with "
                f"{latest.world_size}. Start every rank with the same world size, or use another job name."
            )
        if rank in members:
            raise DisagreementError(
                f"{event.peer} joins job {self.name!r}, but {members[rank].peer} is there already. Give every "
                "process a rank of its own, or use another job name for another run."
            )
        return latest

    # ---- requests of ranks ----

    def contribute(self, generation: Generation, rank: int, event: Contribute, now: float) -> list[Effect]:
        """A rank takes part in an operation."""
        try:
            last_seen = generation.contribute(rank, event, now)
        except RefusedError as error:
            return self.refuse(generation, rank, str(error), event.call, now)
        if last_seen is Receipt.NEW:
            return self.resolve(generation, now)
        if last_seen is Receipt.ANSWERED and generation.answer is not None:
            streams = generation.streams
            return generation.answer.to({rank: streams[rank]} if rank in streams else {})
        return []

    def push(self, generation: Generation, rank: int, event: Push, now: float) -> list[Effect]:
        """A rank replaces the owner's state of a layer."""
        member = generation.members[rank]
        if event.number and event.number <= member.pushes:
            return [Owned(event.stream, self.layers.pulled(event.layer))]
        try:
            pushed = self.layers.pushed(rank, event.number, event.layer, event.state)
        except DisagreementError as error:
            failed = Failed(event.stream, Reason.MISMATCH, str(error), (rank,), event.layer)
            reason = f"pushed what its owner refused: {str(error).rstrip('.')}"
            return [failed, *self.lose(generation, {rank: reason}, now)]
        self.layers.replace(pushed)
        member.pushes = event.number
        return [Record(self.name, pushed), Owned(event.stream, pushed.state)]

    # ---- time passes ----

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects: list[Effect] = []
        for generation in tuple(self.generations):
            lease = self._timeouts.lease if generation.running else 0.0
            ends = {rank: m.end(now, lease) for rank, m in sorted(generation.members.items())}
            lost = {rank: reason for rank, reason in ends.items() if reason}
            frozen = [
                (generation.members[rank].peer, stream) for rank, stream in generation.streams.items() if rank in lost
            ]
            effects += self.lose(generation, lost, now, silent=True) if lost else self.resolve(generation, now)
            for peer, stream in frozen:
                text = f"{peer} {lost[peer.rank]}. That is this process; the other ranks were told."
                effects.append(Failed(stream, Reason.PEER_LOST, text, (peer.rank,)))
            if not generation.over and (text := generation.straggling(now)):
                effects.append(Straggling(self.name, text))
        return effects

    def resolve(self, generation: Generation, now: float) -> list[Effect]:
        """Complete or abort the operation, if it is time."""
        outcome = generation.decide(now)
        if outcome.verdict is not None:
            reason = Reason.DEADLINE if outcome.overdue else REASON_OF[outcome.verdict.kind]
            return self._abort(generation, outcome.verdict, reason)
        if outcome.decision is Decision.COMPLETE:
            return self._complete(generation) + self._go_on(generation, now)
        return []

    def stop(self, text: str) -> list[Effect]:
        """The service shuts down: every rank gets an error."""
        effects: list[Effect] = []
        for generation in tuple(self.generations):
            effects += self._abort(generation, Verdict(ServiceError, text, ()), Reason.STOPPING)
        return effects

    def _go_on(self, generation: Generation, now: float) -> list[Effect]:
        """Take the contributions that came too early, now that the other ranks are there."""
        effects: list[Effect] = []
        for rank, contribution in generation.due():
            if rank in generation.members and not generation.over:
                effects += self.contribute(generation, rank, contribution, now)
        return effects

    def _complete(self, generation: Generation) -> list[Effect]:
        try:
            answer, record = self._answer(generation.pending, generation.completed + 1)
        except DisagreementError as error:
            return self._abort(generation, Verdict(MismatchError, str(error), ()), Reason.MISMATCH)
        generation.finished(answer)
        effects = answer.to(generation.streams)
        if record is None:
            return effects
        return [Record(self.name, record), *effects, ApplyUpdate(self.name, record.call.key.layer or "")]

    def _answer(self, done: PendingOperation, sequence: int) -> tuple[Answer, Completed | None]:
        """The answer to an operation, and the record of it."""
        call, signature = done.call, done.call.signature
        if isinstance(signature, PlainSignature):
            return plain(sequence, call, done.bodies), None
        if done.limbs is not None:
            record = Completed(sequence, call, done.limbs if done.state is None else Replacing(done.limbs, done.state))
        else:
            seeds = {rank: body for rank, body in done.bodies.items() if isinstance(body, LayerState)}
            state, known = self.layers.seeded(call.key.layer or "", seeds, anew=signature.anew)
            record = Completed(sequence, call, state, known)
        return self.operated(record), record

    def operated(self, record: Completed) -> Answer:
        """Apply the record of a completed operation on a layer."""
        call, body = record.call, record.body
        assert not isinstance(call.signature, PlainSignature)
        if isinstance(body, LayerState):
            self.layers.enroll(record, body, anew=call.signature.anew)
            return Answer(record.sequence, call, Enrolled((), record.sequence, body, record.known))
        version = self.layers.reduced(record.sequence, call, call.signature, body)
        limbs = body.limbs if isinstance(body, Replacing) else body
        return Answer(record.sequence, call, Totals((), record.sequence, limbs, version))

    def _abort(self, generation: Generation, verdict: Verdict, reason: Reason) -> list[Effect]:
        """Send the error to every connected rank, and end the generation."""
        effects: list[Effect] = []
        for rank, stream in generation.streams.items():
            key = generation.pending.calls[rank].key if rank in generation.pending.calls else None
            layer, step = (key.layer, key.step) if key else (None, None)
            effects.append(Failed(stream, reason, verdict.text, verdict.ranks, layer, step))
        return effects + self._end(generation, Ended(generation.number, reason, verdict.text, verdict.ranks))

    def _end(self, generation: Generation, ended: Ended) -> list[Effect]:
        generation.over = True
        self.generations.remove(generation)
        self.ended = ended
        if not self.generations:
            self.layers.forget_unfinished()  # the next generation starts from the statistics, not from what led to them
        return [Record(self.name, ended), Persist(self.name)]


def began(generation: Generation) -> Began:
    """The record of a generation's begin, with its ranks."""
    members = tuple(
        MemberRecord(m.peer, m.incarnation, m.timeout, m.pushes) for _, m in sorted(generation.members.items())
    )
    return Began(generation.number, generation.world_size, members)
