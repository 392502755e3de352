"""One job: its generations one after the other, and the layers that outlive them.

Laws of this room:
1. A job exists from its first join. Ranks that join while another generation ends begin the next one.
2. After a failure everybody is told, once; the state stays, and the next join begins a new generation.
3. What a rank sends wrongly costs it its place, never the state.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnlayer.agreement import Verdict
from bnlayer.collective import Call, Operation, PlainTerms
from bnlayer.errors import MismatchError, ServiceError
from bnlayer.state import LayerState
from bnserver.core.effects import (
    REASON_OF,
    Broadcast,
    Closed,
    Effect,
    Enrolled,
    Failed,
    Joined,
    Owned,
    Persist,
    Reason,
    Reduce,
    Released,
    Totals,
)
from bnserver.core.events import Arrays, Contribute, Join, Push
from bnserver.core.generation import Decision, Generation, Member, Round
from bnserver.core.layers import DisagreementError, Layers
from bnserver.core.validation import RefusedError, check, check_join, check_state

LOST = "was lost: its connection broke without a goodbye"


class Job:
    """A job's generations and layers.

    Attributes:
        name: the job's.
        number: of the latest generation; 0 before the first.
        layers: what the owner owns.
    """

    def __init__(self, name: str, number: int = 0, states: Mapping[str, LayerState] | None = None) -> None:
        self.name = name
        self.number = number
        self.layers = Layers(states or {})
        self.generations: list[Generation] = []

    def join(self, event: Join, now: float) -> tuple[Generation | None, list[Effect]]:
        """A rank wants its place; returns the generation that it is now in, None if it was refused."""
        try:
            check_join(event)
            generation = self._gathering(event)
        except RefusedError as error:
            return None, [Failed(event.stream, Reason.INVALID, f"The service refused to let you join: {error}.")]
        except DisagreementError as error:
            return None, [Failed(event.stream, Reason.MISMATCH, str(error), (event.peer.rank,))]
        generation.joined(Member(event.stream, event.peer, event.timeout, now + event.join_timeout))
        if not generation.running:
            return generation, []
        self.layers.forget_unfinished()
        return generation, [Joined(_streams(generation), self.name, generation.number, generation.world_size)]

    def contribute(self, generation: Generation, rank: int, event: Contribute, now: float) -> list[Effect]:
        """A rank takes part in an operation."""
        try:
            check(event, generation.world_size)
            if not generation.spoke(rank, event, now):
                return []
        except RefusedError as error:
            return self.refuse(generation, rank, str(error), event.call, now)
        return self.settle(generation, now)

    def push(self, generation: Generation, rank: int, event: Push, now: float) -> list[Effect]:
        """A rank replaces the owner's state of a layer."""
        try:
            check_state(event.state)
            return [Owned(event.stream, self.layers.pushed(event.layer, event.state))]
        except RefusedError as error:
            return self.refuse(generation, rank, str(error), None, now)
        except DisagreementError as error:
            failed = Failed(event.stream, Reason.MISMATCH, str(error), (rank,), event.layer)
            return [
                failed,
                *self.lose(generation, rank, f"pushed what its owner refused: {str(error).rstrip('.')}", now),
            ]

    def leave(self, generation: Generation, rank: int, reason: str, now: float) -> list[Effect]:
        """A rank says goodbye."""
        if not generation.running:
            reason = reason or "left before every rank had joined"
        closed = Closed(generation.members[rank].stream)
        # Saved before the goodbye is answered: what the last rank is told to be over is on disk.
        return [*self.lose(generation, rank, reason, now), closed]

    def lose(self, generation: Generation, rank: int, reason: str, now: float) -> list[Effect]:
        """A rank is gone, for a reason; none for a clean end."""
        generation.gone(rank, reason)
        effects = self.settle(generation, now)
        if not generation.members and not generation.over:
            effects += self._end(generation)
        return effects

    def refuse(self, generation: Generation, rank: int, text: str, call: Call | None, now: float) -> list[Effect]:
        """A rank sent something that has no meaning: it is out, and the others are told."""
        member = generation.members[rank]
        failed = Failed(
            member.stream,
            Reason.INVALID,
            f"The service refused what {member.peer} sent: {text}.",
            (rank,),
            call.place.layer if call else None,
            call.place.step if call else None,
        )
        return [failed, *self.lose(generation, rank, f"sent what the service refused: {text}", now)]

    def settle(self, generation: Generation, now: float) -> list[Effect]:
        """Complete or abort the operation, if it is time."""
        outcome = generation.decide(now)
        if outcome.verdict is not None:
            reason = Reason.DEADLINE if outcome.overdue else REASON_OF[outcome.verdict.kind]
            return self._abort(generation, outcome.verdict, reason)
        if outcome.decision is Decision.COMPLETE:
            return self._complete(generation)
        return []

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        return [effect for generation in tuple(self.generations) for effect in self.settle(generation, now)]

    def stop(self, text: str) -> list[Effect]:
        """The service goes down: everybody is told."""
        effects: list[Effect] = []
        for generation in tuple(self.generations):
            effects += self._abort(generation, Verdict(ServiceError, text, ()), Reason.STOPPING)
        return effects

    def _gathering(self, event: Join) -> Generation:
        """The generation in which the rank can take its place: the latest, or a new one if that one ends."""
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

    def _complete(self, generation: Generation) -> list[Effect]:
        try:
            effects = self._results(generation.round, _streams(generation), generation.completed + 1)
        except DisagreementError as error:
            return self._abort(generation, Verdict(MismatchError, str(error), ()), Reason.MISMATCH)
        generation.finished()
        return effects

    def _results(self, done: Round, streams: tuple[int, ...], sequence: int) -> list[Effect]:
        call, terms = done.call, done.call.terms
        if isinstance(terms, PlainTerms):
            return _plain_results(done, call.operation, terms, streams, sequence)
        layer = call.place.layer or ""
        if done.words is not None:
            version = self.layers.reduced(call, terms, done.words)
            return [Totals(streams, sequence, done.words, version)]
        seeds = {rank: body for rank, body in done.bodies.items() if isinstance(body, LayerState)}
        return [Enrolled(streams, sequence, self.layers.enrolled(layer, seeds))]

    def _abort(self, generation: Generation, verdict: Verdict, reason: Reason) -> list[Effect]:
        """Tell every rank that is still here, and end the generation."""
        told: list[Effect] = []
        for rank, member in sorted(generation.members.items()):
            place = generation.round.calls[rank].place if rank in generation.round.calls else None
            layer, step = (place.layer, place.step) if place else (None, None)
            told.append(Failed(member.stream, reason, verdict.text, verdict.ranks, layer, step))
        return told + self._end(generation)

    def _end(self, generation: Generation) -> list[Effect]:
        generation.over = True
        self.generations.remove(generation)
        return [Persist(self.name)]


def _plain_results(
    done: Round, operation: Operation, terms: PlainTerms, streams: tuple[int, ...], sequence: int
) -> list[Effect]:
    if operation is Operation.BARRIER:
        return [Released(streams, sequence)]
    if operation is Operation.BROADCAST:
        body = done.bodies[terms.root]
        if not isinstance(body, tuple):
            raise DisagreementError(f"The root of the broadcast, rank {terms.root}, sent no arrays.")
        others = streams[: terms.root] + streams[terms.root + 1 :]
        return [Released((streams[terms.root],), sequence), Broadcast(others, sequence, body)]
    contributions = tuple(body for _, body in sorted(done.bodies.items()) if isinstance(body, tuple))
    kinds = {_described(arrays) for arrays in contributions}
    if len(kinds) > 1:
        raise DisagreementError(f"The ranks sent different arrays to the allreduce: {'; '.join(sorted(kinds))}.")
    return [Reduce(streams, sequence, terms.op, contributions)]


def _streams(generation: Generation) -> tuple[int, ...]:
    """The ranks' connections, in rank order."""
    return tuple(member.stream for _, member in sorted(generation.members.items()))


def _described(arrays: Arrays) -> str:
    return ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in arrays) or "no arrays"
