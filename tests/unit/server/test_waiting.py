"""Who waits for whom, and what is seen of it from outside."""

from __future__ import annotations

from bnlayer.agreement import Peer
from bnlayer.collective import Call, ExchangeKey, Operation, PlainSignature
from bnserver.core.events import ConnectionEnded, Contribute, Join, Leave, Tick
from bnserver.core.generation import Phase
from bnserver.core.members import LivenessTimeouts
from bnserver.core.observation import JobObservation
from bnserver.core.service import Service
from bnserver.core.waiting import BOUNDS, Histogram, Waiting

_BARRIER = Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature())


class _Job:
    """Ranks that do nothing but barriers, at times that are told."""

    def __init__(self, world_size: int, *, joined: int | None = None) -> None:
        self.service = Service(timeouts=LivenessTimeouts(lease=0.0))
        self.sequence = 0
        for rank in range(world_size if joined is None else joined):
            self.service.handle(Join(rank, "j", Peer(rank, "h", 100 + rank), world_size, 900.0, 900.0, 1 + rank), 0.0)

    def barrier(self, *times: float | None) -> None:
        """One operation; None: this rank does not come."""
        self.sequence += 1
        arrivals = [(time, rank) for rank, time in enumerate(times) if time is not None]
        for time, rank in sorted(arrivals):
            self.service.handle(Contribute(rank, 1, self.sequence, _BARRIER, None), time)

    def seen(self, now: float) -> JobObservation:
        return self.service.observe("j", now)


def _waits(seen: JobObservation) -> list[tuple[float, float, float, float, bool]]:
    return [(r.waited, r.held_up, r.waiting, r.awaited, r.is_straggler) for r in seen.ranks]


def test_waited_is_until_the_last_and_held_up_is_what_the_last_alone_costs() -> None:
    """The formulas, over two operations whose last ranks differ."""
    job = _Job(3)
    job.barrier(1.0, 3.0, 4.0)
    job.barrier(6.0, 5.5, 5.0)
    seen = job.seen(10.0)
    assert _waits(seen) == [(3.0, 0.5, 0.0, 0.0, False), (1.5, 0.0, 0.0, 0.0, False), (1.0, 1.0, 0.0, 0.0, True)]
    assert (seen.phase, seen.completed, seen.operations) == (Phase.RUNNING, 2, {(Operation.BARRIER, None): 2})
    assert seen.took_seconds == 4.0
    assert [bound for bound, count in zip((*BOUNDS, None), seen.took, strict=True) if count] == [1.0, 3.0]


def test_what_is_not_complete_counts_up_to_now() -> None:
    """A rank that never comes is seen while it is waited for; and no sum ever goes back."""
    job = _Job(3)
    job.barrier(1.0, None, None)
    assert _waits(job.seen(2.0)) == [(1.0, 0, 1.0, 0, False), (0, 0, 0, 1.0, False), (0, 0, 0, 1.0, False)]
    job.service.handle(Contribute(2, 1, 1, _BARRIER, None), 2.0)
    assert _waits(job.seen(4.0)) == [(3.0, 0, 3.0, 0, False), (0, 2.0, 0, 3.0, True), (2.0, 0, 2.0, 0, False)]
    job.service.handle(Contribute(1, 1, 1, _BARRIER, None), 4.0)
    assert _waits(job.seen(4.0)) == [(3.0, 0, 0, 0, False), (0, 2.0, 0, 0, True), (2.0, 0, 0, 0, False)]


def test_a_straggler_is_forgiven_when_it_has_kept_up_for_a_minute() -> None:
    """What it did an hour ago does not mark it; nor does a twentieth of the time, nor taking turns."""
    job = _Job(2)
    job.barrier(0.0, 10.0)
    assert [rank.is_straggler for rank in job.seen(20.0).ranks] == [False, True]
    for now in (31.0, 62.0):
        job.service.handle(Tick(), now)
    assert [rank.is_straggler for rank in job.seen(70.0).ranks] == [False, False]
    job.barrier(70.0, 71.0)
    assert [rank.is_straggler for rank in job.seen(71.0).ranks] == [False, False]
    job.barrier(80.0, 82.0)
    assert [rank.is_straggler for rank in job.seen(82.0).ranks] == [False, True]
    job.barrier(95.0, 90.0)
    assert [rank.is_straggler for rank in job.seen(95.0).ranks] == [True, False]


def test_ranks_that_take_turns_are_no_stragglers() -> None:
    """A third of the time is lost, and neither rank is to blame alone."""
    job = _Job(2)
    job.barrier(0.0, 2.0)
    job.barrier(5.0, 3.0)
    assert [rank.is_straggler for rank in job.seen(6.0).ranks] == [False, False]


def test_nobody_is_awaited_by_a_rank_that_has_left() -> None:
    """It waited, and failed; the others get its error in a moment."""
    job = _Job(3)
    job.barrier(1.0, None, None)
    job.service.handle(Leave(0, "failed"), 1.1)
    assert [(rank.peer.rank, rank.awaited) for rank in job.seen(1.2).ranks] == [(1, 0.0), (2, 0.0)]


def test_a_world_of_one_waits_for_nobody() -> None:
    """And is no straggler."""
    job = _Job(1)
    job.barrier(1.0)
    assert _waits(job.seen(2.0)) == [(0.0, 0.0, 0.0, 0.0, False)]


def test_who_has_joined_and_who_is_away_is_seen() -> None:
    """Before all have joined, and after a connection broke; a job that is over is not there."""
    job = _Job(3, joined=2)
    seen = job.seen(1.0)
    assert (seen.phase, seen.world_size, [rank.peer.rank for rank in seen.ranks]) == (Phase.JOINING, 3, [0, 1])
    job = _Job(2)
    job.service.handle(ConnectionEnded(1), 1.0)
    assert [rank.is_connected for rank in job.seen(1.25).ranks] == [True, False]
    assert job.seen(1.25).ranks[1].silent == 0.25
    for rank in (0, 1):
        job.service.handle(Join(2 + rank, "j", Peer(rank, "h", 100 + rank), 2, 900.0, 900.0, 1 + rank), 1.3)
        job.service.handle(Leave(2 + rank, ""), 1.4)
    assert not job.service.is_active("j")


def test_a_time_belongs_to_the_first_bound_that_it_does_not_exceed() -> None:
    """As Prometheus reads `le`; the rest is longer than all."""
    histogram = Histogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1):
        histogram.observe(seconds)
    assert histogram.counts == [2, 1, *[0] * (len(BOUNDS) - 3), 1, 1]


def test_nobody_is_a_straggler_of_nothing() -> None:
    """Before the first rank is here."""
    assert Waiting().straggler({}, 1.0) is None
