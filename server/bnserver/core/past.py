"""A job's past, written and read: what `entries` gives, `recovered` turns into the same job.

Laws of this room:
1. Reading a whole past or a shortened one gives the same layers, the same numbers, and the same latest answer.
2. A generation that ran comes back without its ranks: each has a lease to give a sign of life, and be back.
3. Ranks that were still gathering leave no trace: they join again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from bnlayer.collective import Operation
from bnserver.core.answers import Answer
from bnserver.core.entries import Began, Ended, Enlisted, Entry, Kept, Left, Operated, Pushed
from bnserver.core.generation import Generation
from bnserver.core.job import Job, began
from bnserver.core.members import Member, Patience


class PastError(ValueError):
    """Entries that can't follow each other; the text says how."""


def entries(job: Job) -> list[Entry]:
    """The shortest past that leads to this job."""
    past: list[Entry] = [job.ended]
    history = job.layers.entries
    past += [entry for entry in history if isinstance(entry, Kept)]
    running = next((generation for generation in job.generations if generation.running), None)
    if running is not None:
        begin = began(running)
        gone = tuple(Enlisted(peer, 0, 0.0) for peer in running.departed.values())
        past.append(Began(begin.generation, begin.world_size, begin.members + gone))
        past += [Left(running.number, rank, reason) for rank, reason in running.left.items()]
    past += [entry for entry in history if not isinstance(entry, Kept)]
    answer = running.layer_answer if running is not None else None
    if answer is not None and answer.call.operation is Operation.ENROLL:
        state = job.layers.states[answer.call.place.layer or ""]
        past.append(Operated(answer.sequence, answer.call, state))
    return past


def recovered(name: str, past: Iterable[Entry], patience: Patience, now: float) -> Job:
    """The job that a past leads to.

    Args:
        name: the job's.
        past: its entries.
        patience: of this run of the service.
        now: seconds; from here on the ranks have a lease to come back; without one, their timeout.

    Raises:
        PastError: the entries can't follow each other.
    """
    job = Job(name, patience)
    for entry in past:
        try:
            _take(job, entry, patience, now)
        except (KeyError, IndexError, AssertionError, ValueError) as error:
            raise PastError(f"{type(entry).__name__} can't follow what is before it ({error!r})") from error
    return job


def _take(job: Job, entry: Entry, patience: Patience, now: float) -> None:
    match entry:
        case Kept():
            job.layers.keep(entry)
        case Began():
            job.number = entry.generation
            job.layers.forget_unfinished()
            job.generations = [_generation(entry, patience, now)]
        case Ended():
            job.number = max(job.number, entry.generation)
            job.ended = entry
            job.generations = [each for each in job.generations if each.number != entry.generation]
        case Operated():
            _answer(job, job.operated(entry))
        case Pushed():
            job.layers.replace(entry)
            for generation in job.generations:
                if entry.rank in generation.members:
                    generation.members[entry.rank].pushes = entry.number
        case Left():
            _leave(job, entry, now)
        case _:
            assert_never(entry)


def _answer(job: Job, answer: Answer) -> None:
    # Layers are written one after the other, so the numbers may jump back.
    for generation in job.generations:
        if answer.sequence > generation.completed:
            generation.finished(answer)


def _leave(job: Job, entry: Left, now: float) -> None:
    for generation in job.generations:
        if generation.number == entry.generation and entry.rank in generation.members:
            generation.gone(entry.rank, "", now)
            generation.left[entry.rank] = entry.reason  # with the words that it was written with


def _generation(entry: Began, patience: Patience, now: float) -> Generation:
    generation = Generation(entry.generation, entry.world_size, recovering=True)
    for enlisted in entry.members:
        member = Member(enlisted.peer, enlisted.timeout, 0.0, enlisted.incarnation, pushes=enlisted.pushes)
        member.goes(now + patience.return_s(enlisted.incarnation, enlisted.timeout), now, restarted=True)
        generation.joined(member)
    return generation
