"""The service: all jobs. Events in, effects out.

Laws:
1. Every event has its effects at once; whatever takes time (sending, saving, large sums) is an effect.
2. A connection holds one seat: a rank of a generation of a job. Requests of a connection without a seat are ignored.
3. Jobs are independent of each other.
4. Whatever a rank sends is a sign of life.
5. A job that is over costs no time: only a join for it looks at it, and it may be dropped from memory once it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import assert_never

from bnlayer.collective import Operation
from bnlayer.state import LayerState
from bnserver.core.effects import Closed, Effect, Failed, Joined
from bnserver.core.events import (
    ConnectionEnded,
    Contribute,
    Event,
    Heartbeat,
    Join,
    Leave,
    Malformed,
    Pull,
    Push,
    Stop,
    Tick,
)
from bnserver.core.generation import Generation
from bnserver.core.job import Job
from bnserver.core.journal_records import JournalRecord
from bnserver.core.members import LivenessTimeouts, Member
from bnserver.core.observation import JobObservation, observe
from bnserver.core.quotas import Quotas, exceeded
from bnserver.core.reasons import Reason
from bnserver.core.recovery import records, recovered

_STOPPING = "The service is stopping. Start the job again once it is back; its statistics are kept by --state-dir."

_Seated = Contribute | Pull | Push | Leave | ConnectionEnded | Malformed


@dataclass(frozen=True, slots=True)
class _Seat:
    job: Job
    generation: Generation
    rank: int


class Service:
    """The table of jobs.

    Args:
        journals: the records of each job, by name.
        timeouts: how long to wait for signs of life.
        now: seconds, on the clock of `handle`.
        quotas: of jobs, and of the layers of one.

    Raises:
        RecoveryError: a journal is inconsistent.
    """

    def __init__(
        self,
        journals: Mapping[str, Iterable[JournalRecord]] | None = None,
        timeouts: LivenessTimeouts | None = None,
        now: float = 0.0,
        quotas: Quotas | None = None,
    ) -> None:
        self._timeouts = timeouts or LivenessTimeouts()
        self._quotas = quotas or Quotas()
        self._jobs = {name: recovered(name, records, self._timeouts, now) for name, records in (journals or {}).items()}
        self._active = {name: job for name, job in self._jobs.items() if job.is_active}
        self._seats: dict[int, _Seat] = {}
        self._waiting: dict[int, Job] = {}  # connections of ranks that wait for a generation of an elastic job
        self._stopping = False

    @property
    def jobs(self) -> tuple[str, ...]:
        """The names of all jobs in memory."""
        return tuple(self._jobs)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the jobs that are not over: some rank is a member, or is waited for."""
        return tuple(self._active)

    def knows(self, job: str) -> bool:
        """Whether there is a job of this name."""
        return job in self._jobs

    def is_active(self, job: str) -> bool:
        """Whether a job is not over: some rank is a member, or is waited for."""
        return job in self._active

    def is_over(self, job: str) -> bool:
        """Whether a job is in memory, and no rank takes part in it."""
        return job in self._jobs and job not in self._active

    def forget(self, job: str) -> None:
        """Drop a job that is over and saved; `recall` restores it."""
        assert self.is_over(job), f"job {job!r} is not over"
        del self._jobs[job]

    def recall(self, job: str, records: Iterable[JournalRecord], now: float) -> None:
        """Restore a job that was dropped, from its records.

        Raises:
            RecoveryError: they are inconsistent.
        """
        self._jobs[job] = recovered(job, records, self._timeouts, now)
        self._note(self._jobs[job])

    def records(self, job: str) -> list[JournalRecord]:
        """The records from which a job can be restored as it is now."""
        return records(self._jobs[job])

    def states(self, job: str) -> dict[str, LayerState]:
        """The owner's states of a job, by layer."""
        return self._jobs[job].layers.states

    def observe(self, job: str, now: float) -> JobObservation:
        """What there is to see of a job that is not over.

        Args:
            job: one of `active`.
            now: seconds, on the clock of `handle`.
        """
        return observe(self._active[job], now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """The effects of an event.

        Args:
            event: what happened; a request of a rank is valid by itself (`validation.validated`).
            now: seconds, on a clock that never goes back.
        """
        match event:
            case Contribute() | Pull() | Push() | Leave() | ConnectionEnded() | Malformed():
                effects = self._seated(event, now)
            case Heartbeat():
                member = self._member(event)
                if member is not None and member.connection is not None:
                    member.last_seen = now
                return []
            case Join():
                effects = self._join(event, now)
            case Tick():
                effects = self._all_active(lambda job: job.tick(now))
            case Stop():
                self._stopping = True
                effects = self._all_active(lambda job: job.stop(_STOPPING))
            case _:
                assert_never(event)
        for effect in effects:
            if isinstance(effect, Failed | Closed):
                self._seats.pop(effect.connection, None)
                self._waiting.pop(effect.connection, None)
            elif isinstance(effect, Joined) and effect.rank is not None:
                self._seat(effect.connections[0], effect.rank)
        return effects

    def _seated(self, event: _Seated, now: float) -> list[Effect]:
        """An event of a connection: it goes to the generation of which its rank is a member."""
        seat = self._seats.get(event.connection)
        if seat is None:
            return self._unseated(event)
        generation, rank = seat.generation, seat.rank
        generation.members.here[rank].last_seen = now
        if isinstance(event, Push) or (isinstance(event, Contribute) and event.call.operation is Operation.ENROLL):
            event = self._within_quota(seat.job, event)
        match event:
            case Contribute():
                effects = generation.contribute(rank, event, now)
            case Pull():
                effects = generation.pull(rank, event, now)
            case Push():
                effects = generation.push(rank, event, now)
            case Leave():
                effects = generation.leave(rank, event.reason, now)
            case ConnectionEnded():
                del self._seats[event.connection]
                effects = generation.away(rank, now)
            case Malformed():
                effects = generation.refuse(rank, event.text, event.call, now, event.reason)
            case _:
                assert_never(event)
        if generation.ended is not None:
            seat.job.drop_ended()
            self._note(seat.job)
        return effects

    def _within_quota(self, job: Job, event: Contribute | Push) -> Contribute | Push | Malformed:
        """A push or an enrolment; or what takes its place, if the job may have no more layers, or bytes of them."""
        call = event.call if isinstance(event, Contribute) else None
        layer = event.layer if isinstance(event, Push) else event.call.key.layer or ""
        state = event.state if isinstance(event, Push) else event.body
        text = ""
        if len(job.layers) >= self._quotas.layers and job.layers.pulled(layer) is None:
            text = exceeded("layers of a job", self._quotas.layers, len(job.layers) + 1, "--max-layers")
        elif isinstance(state, LayerState):
            size = job.layers.size_with(layer, state)
            if size > max(self._quotas.layer_bytes, job.layers.size):  # what was taken before stays
                text = exceeded("bytes of a job's layers", self._quotas.layer_bytes, size, "--max-layer-bytes")
        return Malformed(event.connection, text, call, Reason.QUOTA) if text else event

    def _unseated(self, event: Contribute | Pull | Push | Leave | ConnectionEnded | Malformed) -> list[Effect]:
        """An event of a connection without a seat; one that waits for a generation of an elastic job waits no more."""
        job = self._waiting.pop(event.connection, None)
        if job is not None:
            job.withdraw(event.connection)
            self._note(job)
        if isinstance(event, Malformed):
            return [Failed(event.connection, event.reason, f"The service refused what you sent: {event.text}.")]
        if job is None or isinstance(event, ConnectionEnded):
            return []
        if isinstance(event, Leave):
            return [Closed(event.connection)]
        text = "The service refused what you sent: expected nothing before all ranks have joined."
        return [Failed(event.connection, Reason.INVALID, text)]

    def _seat(self, connection: int, rank: int) -> None:
        """A rank that waited is in a generation of its job."""
        job = self._waiting.pop(connection, None)
        if job is not None:
            self._seats[connection] = _Seat(job, job.generations[-1], rank)

    def _all_active(self, action: Callable[[Job], list[Effect]]) -> list[Effect]:
        effects: list[Effect] = []
        for job in tuple(self._active.values()):
            effects += action(job)
            self._note(job)
        return effects

    def _note(self, job: Job) -> None:
        """Record whether a job is over, after an event of its own."""
        if job.is_active:
            self._active[job.name] = job
        else:
            self._active.pop(job.name, None)

    def _member(self, beat: Heartbeat) -> Member | None:
        job = self._jobs.get(beat.job)
        for generation in job.generations if job is not None else ():
            member = generation.members.here.get(beat.rank)
            if member is not None and member.incarnation == beat.incarnation:
                return member
        return None

    def _join(self, event: Join, now: float) -> list[Effect]:
        if self._stopping:
            return [Failed(event.connection, Reason.STOPPING, _STOPPING)]
        if event.job not in self._active and len(self._active) >= self._quotas.jobs:
            text = exceeded("jobs at a time", self._quotas.jobs, len(self._active) + 1, "--max-jobs")
            return [Failed(event.connection, Reason.QUOTA, f"The service refused job {event.job!r}: {text}.")]
        job = self._jobs.get(event.job) or Job(event.job, self._timeouts)
        generation, effects = job.join(event, now)
        if event.job in self._jobs or job.is_active:
            self._jobs[event.job] = job
            self._note(job)
        if generation is not None:
            rank = event.peer.rank if event.elastic is None else generation.rank_on(event.connection)
            self._seats[event.connection] = _Seat(job, generation, rank)
        elif event.elastic is not None and not any(isinstance(effect, Failed) for effect in effects):
            self._waiting[event.connection] = job
        return effects
