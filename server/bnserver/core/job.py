"""One job: its generations one after the other, and the layers that outlive them.

Laws:
1. A job exists from its first join. Ranks that join while another generation ends begin the next one.
2. When a generation is over, the layers' states stay, and the next join begins a new one.
3. A rank that is away when the others get an error gets the same one when it reconnects.
4. Of an elastic job, one generation runs at a time; ranks that join meanwhile wait for the next one (`rendezvous`).
"""

from __future__ import annotations

from dataclasses import replace

from bnserver.core import explanations
from bnserver.core.answers import DisagreementError
from bnserver.core.effects import Effect, Failed
from bnserver.core.events import Elastic, Join
from bnserver.core.generation import Generation
from bnserver.core.journal_records import Ended
from bnserver.core.layers import Layers
from bnserver.core.members import LOST, LivenessTimeouts, Member
from bnserver.core.reasons import Reason
from bnserver.core.rendezvous import Rendezvous, Waiting


class Job:
    """A job's generations and layers.

    Attributes:
        name: the job's.
        timeouts: how long it waits for signs of life.
        number: of the latest generation; 0 before the first.
        layers: the owner's state.
        generations: those that are not over, the latest last.
        ended: how the latest one that is over ended.
        rendezvous: those that wait for the next generation, if the job is elastic.
    """

    def __init__(self, name: str, timeouts: LivenessTimeouts) -> None:
        self.name = name
        self.timeouts = timeouts
        self.number = 0
        self.layers = Layers()
        self.generations: list[Generation] = []
        self.ended = Ended(0)
        self.rendezvous = Rendezvous(name)

    @property
    def is_active(self) -> bool:
        """Whether it is not over: some rank is a member, or waits."""
        return bool(self.generations or self.rendezvous.waiting)

    def join(self, event: Join, now: float) -> tuple[Generation | None, list[Effect]]:
        """A rank joins or reconnects; returns the generation that it is now in, None if it was refused or waits."""
        effects: list[Effect] = []
        generation = self._of(event)
        if generation is not None:
            if event.elastic is not None:
                event = replace(event, peer=replace(event.peer, rank=_rank_of(event, generation)))
            effects = generation.returned(event, now)
            self.drop_ended()
            return generation, effects
        if event.resume is not None:
            return None, [self._stale(event)]
        try:
            self._refuse_other_kind(event)
            if event.elastic is not None:
                return None, self._wait(event, now)
            effects = self._make_room(event, now)
            generation = self._gathering(event)
        except DisagreementError as error:
            failed = Failed(event.connection, Reason.MISMATCH, str(error), (event.peer.rank,))
            return None, [*effects, failed]
        member = Member(event.peer, event.timeout, now + event.join_timeout, event.incarnation)
        member.connect(event.connection, 0, now)
        return generation, effects + generation.joined(member, now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects = [effect for generation in self.generations for effect in generation.tick(now)]
        self.drop_ended()
        effects += self._begin(now)
        if self.rendezvous.waiting:
            if not self.generations and self.ended.reason is Reason.FINISHED and self.rendezvous.before:
                effects += self._turn_away_late()
            running = self.generations[-1].world_size if self.generations else 0
            effects += self.rendezvous.overdue(now, running)
            self._count_waiting()
        return effects

    def withdraw(self, connection: int) -> None:
        """A rank that waited does so no more."""
        self.rendezvous.remove(connection)
        self._count_waiting()

    def stop(self, text: str) -> list[Effect]:
        """The service shuts down: every rank gets an error."""
        effects = [effect for generation in self.generations for effect in generation.stop(text)]
        self.drop_ended()
        return effects + self.rendezvous.fail(Reason.STOPPING, text)

    def drop_ended(self) -> None:
        """Drop the generations that are over; the next one starts from the statistics, not from what led to them."""
        for generation in tuple(self.generations):
            if generation.ended is not None:
                self.ended = generation.ended
                if generation.elastic is not None:
                    self.rendezvous.ended(generation.number, generation.left)
                self.generations.remove(generation)
                if not self.generations:
                    self.layers.forget_unfinished()

    def _of(self, event: Join) -> Generation | None:
        """The generation that this very process is a member of already; None if there is none."""
        if not event.incarnation:
            return None
        for generation in self.generations:
            if event.elastic is not None:
                if _rank_of(event, generation) >= 0:
                    return generation
                continue
            member = generation.members.here.get(event.peer.rank)
            if member is not None and member.incarnation == event.incarnation:
                return generation
        return None

    # ---- an elastic job ----

    def _refuse_other_kind(self, event: Join) -> None:
        """Make sure that all ranks agree whether the job is elastic, and within which limits.

        Raises:
            DisagreementError: they don't.
        """
        elastic = self.rendezvous.elastic
        if elastic is None:
            if not self.generations:
                return
            elastic = self.generations[-1].elastic
        if event.elastic != elastic:
            raise DisagreementError(
                f"{event.peer} joins job {self.name!r} {_kind(event.elastic)}, but its other ranks joined it "
                f"{_kind(elastic)}. Start every rank with the same --elastic MIN:MAX, or use another job name."
            )

    def _wait(self, event: Join, now: float) -> list[Effect]:
        """A rank of an elastic job joins: it waits for the next generation, which may begin with it."""
        if self.ended.reason is Reason.FINISHED and event.restarted and not self.is_active:
            return [Failed(event.connection, Reason.FINISHED, explanations.finished(self.name))]
        if not self.generations and self.ended.reason is Reason.FINISHED and not self.rendezvous.waiting:
            self.rendezvous.ended(0, 0)  # another run of the same name
        self.rendezvous.add(event, now)
        self._count_waiting()
        return self._begin(now)

    def _begin(self, now: float) -> list[Effect]:
        """Begin the next generation of an elastic job, if it is time."""
        if self.generations or not self.rendezvous.is_due(now):
            return []
        elastic = self.rendezvous.elastic
        chosen = self.rendezvous.take()
        self.number += 1
        generation = Generation(self.name, self.number, len(chosen), self.layers, self.timeouts, elastic=elastic)
        self.generations.append(generation)
        effects: list[Effect] = []
        for rank, waiting in enumerate(chosen):
            effects += generation.joined(_member(rank, waiting), now)
        self._count_waiting()
        return effects

    def _turn_away_late(self) -> list[Effect]:
        """The job was finished while these waited as spares."""
        return self.rendezvous.fail(Reason.FINISHED, explanations.finished(self.name))

    def _count_waiting(self) -> None:
        for generation in self.generations:
            generation.awaited = len(self.rendezvous.waiting)

    def _stale(self, event: Join) -> Failed:
        """Why a rank can't reconnect."""
        assert event.resume is not None
        number, ended = event.resume.generation, self.ended
        if event.elastic is not None and ended.reason is not Reason.FINISHED:
            text = f"{event.peer} was away for too long, and its generation {number} of job {self.name!r} is over."
            return Failed(event.connection, Reason.REGROUP, f"{text} {explanations.regroup(self.name)}")
        if ended.generation == number and ended.reason is not None:
            return Failed(event.connection, ended.reason, ended.text, ended.ranks)
        if event.elastic is not None:  # it was given up, and the others have finished since
            return Failed(event.connection, Reason.FINISHED, explanations.finished_meanwhile(self.name))
        if not self.number:
            why = "this service knows nothing of the job: it was started anew, without what it had kept (--state-dir)"
        else:
            why = f"that generation is over; the latest one is {self.number}"
        text = f"{event.peer} can't come back into generation {number} of job {self.name!r}: {why}. Start it again."
        return Failed(event.connection, Reason.STALE, text)

    def _make_room(self, event: Join, now: float) -> list[Effect]:
        """Remove a member that is away, as a new process joins with its rank: the old one can't reconnect any more."""
        effects: list[Effect] = []
        for generation in self.generations:
            member = generation.members.here.get(event.peer.rank)
            if member is not None and member.connection is None:
                effects += generation.lose({event.peer.rank: LOST}, now, silent=True)
        self.drop_ended()
        return effects

    def _gathering(self, event: Join) -> Generation:
        """The generation that the rank can join: the latest, or a new one if that one is ending.

        Raises:
            DisagreementError: it has another world size, or this rank already.
        """
        latest = self.generations[-1] if self.generations else None
        if latest is None or latest.members.left:
            self.number += 1
            latest = Generation(self.name, self.number, event.world_size, self.layers, self.timeouts)
            self.generations.append(latest)
            return latest
        rank, members = event.peer.rank, latest.members.here
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


def _rank_of(event: Join, generation: Generation) -> int:
    """The rank that a process has in a generation of an elastic job; -1 if it has none."""
    here = generation.members.here
    return next((rank for rank, member in here.items() if member.incarnation == event.incarnation), -1)


def _member(rank: int, waiting: Waiting) -> Member:
    join = waiting.join
    member = Member(replace(join.peer, rank=rank), join.timeout, waiting.deadline, join.incarnation)
    member.connect(join.connection, 0, 0.0)  # the lease begins once all have joined
    return member


def _kind(elastic: Elastic | None) -> str:
    return "as one that is not elastic" if elastic is None else f"as an elastic one of {elastic} ranks"
