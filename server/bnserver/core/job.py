"""One job: its generations one after the other, and the layers that outlive them.

Laws:
1. A job exists from its first join. Ranks that join while another generation ends begin the next one.
2. When a generation is over, the layers' states stay, and the next join begins a new one.
3. A rank that is away when the others get an error gets the same one when it reconnects.
"""

from __future__ import annotations

from bnserver.core.answers import DisagreementError
from bnserver.core.effects import Effect, Failed
from bnserver.core.events import Join
from bnserver.core.generation import Generation
from bnserver.core.journal_records import Ended
from bnserver.core.layers import Layers
from bnserver.core.members import LOST, LivenessTimeouts, Member
from bnserver.core.reasons import Reason


class Job:
    """A job's generations and layers.

    Attributes:
        name: the job's.
        timeouts: how long it waits for signs of life.
        number: of the latest generation; 0 before the first.
        layers: the owner's state.
        generations: those that are not over, the latest last.
        ended: how the latest one that is over ended.
    """

    def __init__(self, name: str, timeouts: LivenessTimeouts) -> None:
        self.name = name
        self.timeouts = timeouts
        self.number = 0
        self.layers = Layers()
        self.generations: list[Generation] = []
        self.ended = Ended(0)

    def join(self, event: Join, now: float) -> tuple[Generation | None, list[Effect]]:
        """A rank joins or reconnects; returns the generation that it is now in, None if it was refused."""
        generation = self._of(event)
        if generation is not None:
            effects = generation.returned(event, now)
            self.drop_ended()
            return generation, effects
        if event.resume is not None:
            return None, [self._stale(event)]
        effects = self._make_room(event, now)
        try:
            generation = self._gathering(event)
        except DisagreementError as error:
            failed = Failed(event.stream, Reason.MISMATCH, str(error), (event.peer.rank,))
            return None, [*effects, failed]
        member = Member(event.peer, event.timeout, now + event.join_timeout, event.incarnation)
        member.connect(event.stream, 0, now)
        return generation, effects + generation.joined(member, now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        effects = [effect for generation in self.generations for effect in generation.tick(now)]
        self.drop_ended()
        return effects

    def stop(self, text: str) -> list[Effect]:
        """The service shuts down: every rank gets an error."""
        effects = [effect for generation in self.generations for effect in generation.stop(text)]
        self.drop_ended()
        return effects

    def drop_ended(self) -> None:
        """Drop the generations that are over; the next one starts from the statistics, not from what led to them."""
        for generation in tuple(self.generations):
            if generation.ended is not None:
                self.ended = generation.ended
                self.generations.remove(generation)
                if not self.generations:
                    self.layers.forget_unfinished()

    def _of(self, event: Join) -> Generation | None:
        """The generation that this very process is a member of already; None if there is none."""
        if not event.incarnation:
            return None
        for generation in self.generations:
            member = generation.members.here.get(event.peer.rank)
            if member is not None and member.incarnation == event.incarnation:
                return generation
        return None

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
        for generation in self.generations:
            member = generation.members.here.get(event.peer.rank)
            if member is not None and member.stream is None:
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
