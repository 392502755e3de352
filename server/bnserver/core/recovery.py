"""Recovery: `recovered` rebuilds a job from its journal; `records` gives the shortest journal for a job.

Laws:
1. A full journal and a shortened one give the same layers, the same numbers, and the same latest answer.
2. A running generation is recovered with all its ranks away: each has a lease to reconnect.
3. Ranks that were still joining are not recorded: they join again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from bnserver.core.answers import Answer, DisagreementError
from bnserver.core.effects import Enrolled
from bnserver.core.generation import Generation
from bnserver.core.job import Job
from bnserver.core.journal_records import (
    Began,
    Completed,
    Ended,
    JournalRecord,
    LayerSnapshot,
    Left,
    MemberRecord,
    Pushed,
)
from bnserver.core.members import LivenessTimeouts, Member, Sign


class RecoveryError(ValueError):
    """The records can't follow each other; the text says why."""


def records(job: Job) -> list[JournalRecord]:
    """The shortest journal that restores this job."""
    records: list[JournalRecord] = [job.ended]
    running = next((generation for generation in job.generations if generation.is_running), None)
    if running is not None:
        begin = running.began()
        departed = tuple(MemberRecord(peer, 0, 0.0) for peer in running.members.departed.values())
        records.append(Began(begin.generation, begin.world_size, begin.members + departed, begin.elastic))
        records += [Left(running.number, rank, reason) for rank, reason in running.members.left.items()]
        answer = running.progress.layer_answer
        if answer is not None and isinstance(answer.result, Enrolled):
            # For ranks that lack this answer. Later changes of the layer are in the records that follow.
            records.append(Completed(answer.sequence, answer.call, answer.result.state, answer.result.known))
    history = job.layers.records
    records += [record for record in history if isinstance(record, LayerSnapshot)]
    records += [record for record in history if not isinstance(record, LayerSnapshot)]
    return records


def recovered(name: str, records: Iterable[JournalRecord], timeouts: LivenessTimeouts, now: float) -> Job:
    """The job that a journal describes.

    Args:
        name: the job's.
        records: of its journal, in order.
        timeouts: of this run of the service.
        now: seconds; from here on the ranks have a lease to reconnect; without one, their timeout.

    Raises:
        RecoveryError: the records can't follow each other.
    """
    job = Job(name, timeouts)
    for record in records:
        try:
            _take(job, record, now)
        except (DisagreementError, KeyError, IndexError, AssertionError, ValueError) as error:
            raise RecoveryError(f"{type(record).__name__} can't follow what is before it ({error!r})") from error
    return job


def _take(job: Job, record: JournalRecord, now: float) -> None:
    match record:
        case LayerSnapshot():
            job.layers.keep(record)
        case Began():
            job.number = record.generation
            job.layers.forget_unfinished()
            job.generations = [_generation(job, record, now)]
        case Ended():
            job.number = max(job.number, record.generation)
            job.ended = record
            job.generations = [each for each in job.generations if each.number != record.generation]
            if not job.generations:
                job.layers.forget_unfinished()
        case Completed():
            _answer(job, job.layers.completed(record))
        case Pushed():
            job.layers.replace(record)
            for generation in job.generations:
                if record.rank in generation.members.here:
                    generation.members.here[record.rank].pushes = record.number
        case Left():
            _leave(job, record, now)
        case _:
            assert_never(record)


def _answer(job: Job, answer: Answer) -> None:
    # Layers are written one after the other, so the numbers may jump back.
    for generation in job.generations:
        if answer.sequence > generation.progress.completed:
            generation.progress.finished(answer)


def _leave(job: Job, record: Left, now: float) -> None:
    for generation in job.generations:
        if generation.number == record.generation and record.rank in generation.members.here:
            generation.gathering.depart(record.rank, now, now, failed=bool(record.reason))
            generation.members.remove(record.rank, record.reason)


def _generation(job: Job, record: Began, now: float) -> Generation:
    timeouts = job.timeouts
    generation = Generation(
        job.name, record.generation, record.world_size, job.layers, timeouts, recovering=True, elastic=record.elastic
    )
    for recorded in record.members:
        member = Member(recorded.peer, recorded.timeout, 0.0, recorded.incarnation, pushes=recorded.pushes)
        member.disconnect(timeouts.return_s(recorded.incarnation, recorded.timeout), now, Sign.RESTARTS)
        generation.members.add(member)
    return generation
