"""The service: all jobs. Events in, effects out.

Laws of this room:
1. Every event has its effects at once; whatever takes time (sending, saving, large sums) is an effect.
2. A stream holds one seat: a rank of a generation of a job. What a stream without a seat says is ignored.
3. Jobs don't know of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from bnlayer.state import LayerState
from bnserver.core.effects import Closed, Effect, Failed, Owned, Reason
from bnserver.core.events import Contribute, Event, Join, Leave, Lost, Malformed, Pull, Push, Stop, Tick
from bnserver.core.generation import Generation
from bnserver.core.job import LOST, Job

_STOPPING = "The service is stopping. Start the job again once it is back; its statistics are kept by --state-dir."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a job leaves behind: enough to go on with it.

    Attributes:
        job: its name.
        generation: the number of its latest generation.
        states: of its layers, by name.
    """

    job: str
    generation: int
    states: Mapping[str, LayerState]


@dataclass(frozen=True, slots=True)
class _Seat:
    job: Job
    generation: Generation
    rank: int


class Service:
    """The table of jobs."""

    def __init__(self, snapshots: tuple[Snapshot, ...] = ()) -> None:
        self._jobs = {kept.job: Job(kept.job, kept.generation, kept.states) for kept in snapshots}
        self._seats: dict[int, _Seat] = {}
        self._stopping = False

    @property
    def jobs(self) -> tuple[str, ...]:
        """The names of all jobs."""
        return tuple(self._jobs)

    def snapshot(self, job: str) -> Snapshot:
        """What a job would leave behind now."""
        found = self._jobs[job]
        return Snapshot(job, found.number, found.layers.states)

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
                return [effect for job in self._jobs.values() for effect in job.tick(now)]
            case Stop():
                self._stopping = True
                return [effect for job in self._jobs.values() for effect in job.stop(_STOPPING)]
            case _:
                seat = self._seats.get(event.stream)
                if seat is None:
                    return _unseated(event)
                return _seated(seat, event, now)

    def _join(self, event: Join, now: float) -> list[Effect]:
        if self._stopping:
            return [Failed(event.stream, Reason.STOPPING, _STOPPING)]
        job = self._jobs.get(event.job) or Job(event.job)
        generation, effects = job.join(event, now)
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
            return job.lose(generation, rank, LOST, now)
        case Malformed():
            return job.refuse(generation, rank, event.text, None, now)
        case _:
            assert_never(event)
