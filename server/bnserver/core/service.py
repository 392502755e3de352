"""The service: all jobs. Events in, effects out.

Laws:
1. Every event has its effects at once; whatever takes time (sending, saving, large sums) is an effect.
2. A stream holds one seat: a rank of a generation of a job. What a stream without a seat says is ignored.
3. Jobs don't know of each other.
4. Whatever a rank sends is a sign of life.
5. A job that is over costs nothing: no event but a join for it looks at it, and it may be forgotten once it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import assert_never

from bnlayer.state import LayerState
from bnserver.core.effects import Closed, Effect, Failed, Owned
from bnserver.core.events import Contribute, Event, Heartbeat, Join, Leave, Lost, Malformed, Pull, Push, Stop, Tick
from bnserver.core.generation import Generation
from bnserver.core.job import Job
from bnserver.core.journal_records import JournalRecord
from bnserver.core.members import LivenessTimeouts, Member
from bnserver.core.reasons import Reason
from bnserver.core.recovery import records, recovered

_STOPPING = "The service is stopping. Start the job again once it is back; its statistics are kept by --state-dir."


@dataclass(frozen=True, slots=True)
class _Seat:
    job: Job
    generation: Generation
    rank: int


class Service:
    """The table of jobs.

    Args:
        journals: what jobs left behind, by name.
        timeouts: how long to wait for signs of life.
        now: seconds, on the clock of `handle`.

    Raises:
        RecoveryError: a past makes no sense.
    """

    def __init__(
        self,
        journals: Mapping[str, Iterable[JournalRecord]] | None = None,
        timeouts: LivenessTimeouts | None = None,
        now: float = 0.0,
    ) -> None:
        self._timeouts = timeouts or LivenessTimeouts()
        self._jobs = {name: recovered(name, records, self._timeouts, now) for name, records in (journals or {}).items()}
        self._active = {name: job for name, job in self._jobs.items() if job.generations}
        self._seats: dict[int, _Seat] = {}
        self._stopping = False

    @property
    def jobs(self) -> tuple[str, ...]:
        """The names of all jobs, but for those that were forgotten."""
        return tuple(self._jobs)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the jobs that are not over: some rank has its place there, or is waited for."""
        return tuple(self._active)

    def knows(self, job: str) -> bool:
        """Whether there is a job of this name."""
        return job in self._jobs

    def is_over(self, job: str) -> bool:
        """Whether a job is known, and no rank takes part in it."""
        return job in self._jobs and job not in self._active

    def forget(self, job: str) -> None:
        """Drop a job that is over and saved; `recall` brings it back."""
        assert self.is_over(job), f"job {job!r} is not over"
        del self._jobs[job]

    def recall(self, job: str, records: Iterable[JournalRecord], now: float) -> None:
        """Know a job again that was forgotten, from what it left behind.

        Raises:
            RecoveryError: it makes no sense.
        """
        self._jobs[job] = recovered(job, records, self._timeouts, now)
        self._note(self._jobs[job])

    def records(self, job: str) -> list[JournalRecord]:
        """What a job would leave behind now: enough to go on with it."""
        return records(self._jobs[job])

    def states(self, job: str) -> dict[str, LayerState]:
        """What a job owns, by layer."""
        return self._jobs[job].layers.states

    def apply_update(self, job: str, layer: str) -> None:
        """Bring a layer's statistics up to date."""
        self._jobs[job].layers.apply_update(layer)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Decide what an event brings about.

        Args:
            event: what happened.
            now: seconds, on a clock that never goes back.
        """
        effects = self._decide(event, now)
        if isinstance(event, Lost):
            self._seats.pop(event.stream, None)
        for effect in effects:
            if isinstance(effect, Failed | Closed):
                self._seats.pop(effect.stream, None)
        return effects

    def _decide(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Join():
                return self._join(event, now)
            case Tick():
                return self._all_active(lambda job: job.tick(now))
            case Heartbeat():
                member = self._member(event)
                if member is not None and member.stream is not None:
                    member.last_seen = now
                return []
            case Stop():
                self._stopping = True
                return self._all_active(lambda job: job.stop(_STOPPING))
            case _:
                seat = self._seats.get(event.stream)
                if seat is None:
                    return _unseated(event)
                effects = _seated(seat, event, now)
                self._note(seat.job)
                return effects

    def _all_active(self, action: Callable[[Job], list[Effect]]) -> list[Effect]:
        effects: list[Effect] = []
        for job in tuple(self._active.values()):
            effects += action(job)
            self._note(job)
        return effects

    def _note(self, job: Job) -> None:
        """Note whether a job that something happened to is over."""
        if job.generations:
            self._active[job.name] = job
        else:
            self._active.pop(job.name, None)

    def _member(self, beat: Heartbeat) -> Member | None:
        job = self._jobs.get(beat.job)
        for generation in job.generations if job is not None else ():
            member = generation.members.get(beat.rank)
            if member is not None and member.incarnation == beat.incarnation:
                return member
        return None

    def _join(self, event: Join, now: float) -> list[Effect]:
        if self._stopping:
            return [Failed(event.stream, Reason.STOPPING, _STOPPING)]
        job = self._jobs.get(event.job) or Job(event.job, self._timeouts)
        generation, effects = job.join(event, now)
        if event.job in self._jobs or generation is not None:
            self._note(job)
        if generation is not None:
            self._jobs[event.job] = job
            self._seats[event.stream] = _Seat(job, generation, event.peer.rank)
        return effects


def _unseated(event: Contribute | Pull | Push | Leave | Lost | Malformed) -> list[Effect]:
    if isinstance(event, Malformed):
        return [Failed(event.stream, Reason.INVALID, f"The service could not read what you sent: {event.text}.")]
    return []


def _seated(seat: _Seat, event: Contribute | Pull | Push | Leave | Lost | Malformed, now: float) -> list[Effect]:
    job, generation, rank = seat.job, seat.generation, seat.rank
    generation.members[rank].last_seen = now
    match event:
        case Contribute():
            return job.contribute(generation, rank, event, now)
        case Pull():
            return [Owned(event.stream, job.layers.pulled(event.layer))]
        case Push():
            return job.push(generation, rank, event, now)
        case Leave():
            return job.leave(generation, rank, event.reason, now)
        case Lost():
            return job.away(generation, rank, now)
        case Malformed():
            return job.refuse(generation, rank, event.text, None, now)
        case _:
            assert_never(event)
