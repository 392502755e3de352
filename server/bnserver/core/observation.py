"""What can be seen of a job from outside: one observation for metrics, `bnlayer jobs` and the page alike.

Observing changes nothing, and costs time in proportion to the ranks that have joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnlayer.agreement import Peer
from bnlayer.collective import Call
from bnlayer.state import LayerState
from bnserver.core.generation import SLOW_S, Generation, Phase
from bnserver.core.job import Job
from bnserver.core.waiting import Kind


@dataclass(frozen=True, slots=True)
class RankObservation:
    """A rank that is here, or away for a short time.

    Attributes:
        peer: the rank, and where it runs.
        is_connected: whether it has a connection now.
        waited: seconds for which it has waited for others.
        held_up: seconds for which all others have waited for it alone.
        waiting: seconds for which it has been waiting in the present operation; 0: it is not.
        awaited: seconds for which others have been waiting for it now; 0: they are not.
        silent: seconds since its last sign of life.
        is_straggler: whether it has lately held up the others, or does so now.
    """

    peer: Peer
    is_connected: bool
    waited: float
    held_up: float
    waiting: float
    awaited: float
    silent: float
    is_straggler: bool


@dataclass(frozen=True, slots=True, eq=False)
class JobObservation:
    """A job that is not over.

    Attributes:
        job: its name.
        phase: of its latest generation.
        generation: the number of that.
        world_size: how many ranks it has.
        completed: operations so far.
        call: the operation that its ranks are in; where none waits, the last one.
        states: the owner's, by layer.
        operations: how many are complete, by kind.
        took: operations up to each of `waiting.BOUNDS`, and longer ones; not cumulative.
        took_seconds: all together.
        ranks: those that have joined, in order.
    """

    job: str
    phase: Phase
    generation: int
    world_size: int
    completed: int
    call: Call | None
    states: Mapping[str, LayerState]
    operations: Mapping[Kind, int]
    took: tuple[int, ...]
    took_seconds: float
    ranks: tuple[RankObservation, ...]

    @property
    def layers(self) -> int:
        """How many the owner has."""
        return len(self.states)

    @property
    def version(self) -> int:
        """The highest among its layers."""
        return max((state.version for state in self.states.values()), default=0)


def observe(job: Job, now: float) -> JobObservation:
    """What there is to see of a job that is not over.

    Args:
        job: it has a generation.
        now: seconds.
    """
    generation = job.generations[-1]
    waiting, gathering = generation.waiting, generation.gathering
    latest = generation.progress.latest
    return JobObservation(
        job.name,
        generation.phase,
        generation.number,
        generation.world_size,
        generation.progress.completed,
        next(iter(gathering.calls.values()), latest),
        job.layers.states,
        dict(waiting.operations),
        tuple(waiting.took.counts),
        waiting.took.seconds,
        _ranks(generation, now),
    )


def _ranks(generation: Generation, now: float) -> tuple[RankObservation, ...]:
    waiting, members = generation.waiting, generation.members.here
    arrivals = generation.gathering.arrivals if generation.phase is not Phase.JOINING else {}
    missing = [rank for rank in members if rank not in arrivals] if arrivals else []
    held_up = {rank: waiting.held_up.get(rank, 0.0) for rank in members}
    if len(missing) == 1:
        held_up[missing[0]] += now - max(arrivals.values())
    straggler = waiting.straggler(held_up, now) if generation.phase is Phase.RUNNING else None
    awaited = now - generation.gathering.since if missing else 0.0
    layers = []
    for rank, member in sorted(members.items()):
        since = now - arrivals[rank] if rank in arrivals else 0.0
        awaited_now = awaited if rank in missing else 0.0
        layers.append(
            RankObservation(
                member.peer,
                member.connection is not None,
                waiting.waited.get(rank, 0.0) + since,
                held_up[rank],
                since,
                awaited_now,
                max(now - member.last_seen, 0.0),
                rank == straggler or awaited_now >= SLOW_S,
            )
        )
    return tuple(layers)
