"""A rank that is cut off without a sign: its bytes go nowhere, on connections that stay up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fault.daemons import Daemon, daemon
from support.fault.faults import FOR_EVER_S, HEALTHY, Fault, Kind
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.proxy import proxy
from support.fault.rank_kills import DEFAULT_LEASE_S
from support.fault.ranks import Rank, ranks
from support.fault.seed import SEED
from support.fault.soak import SHORT_LEASE_S

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_WORLD = 3
_CUT_OFF = 1  # the rank
_AFTER_BYTES = 6_000  # in the second step
_TIMEOUT_S = 3.0
_STEPS = 12

WAYS = {
    "up": Fault(Kind.BLACKHOLE, up=True, after=_AFTER_BYTES, seconds=FOR_EVER_S),
    "down": Fault(Kind.BLACKHOLE, up=False, after=_AFTER_BYTES, seconds=FOR_EVER_S),
    "both": Fault(Kind.BLACKHOLE, up=True, after=_AFTER_BYTES, seconds=FOR_EVER_S, both=True),
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests here."""
    with daemon(tmp_path_factory.mktemp("service"), f"--lease={SHORT_LEASE_S:g}") as one:
        yield one


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """The same ranks in all tests here, each with a job of its own."""
    with ranks(_WORLD, tmp_path_factory.mktemp("ranks")) as workers:
        yield workers


@ways
def test_a_rank_whose_connection_falls_silent_makes_another_one(
    way: str, service: Daemon, team: list[Rank], tmp_path: Path
) -> None:
    """The next connection is sound: the job goes on, and nothing is lost or counted twice."""

    def plan(rank: int, number: int) -> Fault:
        return WAYS[way] if (rank, number) == (_CUT_OFF, 0) else HEALTHY

    with proxy(service.address, _WORLD, plan) as between:
        job = Job(f"silent-{way}", team, between.addresses, tmp_path, seed=SEED, until=_STEPS)
        job.expect("joined")
        job.expect("reached")
        assert between.struck == {Kind.BLACKHOLE: 1}
        job.leave()
        assert check(job.histories(), owner(service.address, job.name)) == []


def test_a_connection_that_falls_silent_while_ranks_gather(service: Daemon, team: list[Rank], tmp_path: Path) -> None:
    """Its join never arrives: it makes another connection long before its patience is at its end."""
    fault = Fault(Kind.BLACKHOLE, up=True, after=100, seconds=FOR_EVER_S, both=True)

    def plan(rank: int, number: int) -> Fault:
        return fault if (rank, number) == (_CUT_OFF, 0) else HEALTHY

    with proxy(service.address, _WORLD, plan) as between:
        began = time.monotonic()
        job = Job("gathering", team, between.addresses, tmp_path, seed=SEED, until=_STEPS)
        job.expect("joined")
        assert time.monotonic() - began <= DEFAULT_LEASE_S  # until it has joined, a rank knows of no other
        assert between.struck == {Kind.BLACKHOLE: 1}
        job.finish()
        job.leave()


@ways
def test_a_rank_that_stays_cut_off_is_reported_to_the_others(
    way: str, service: Daemon, team: list[Rank], tmp_path: Path
) -> None:
    """By name, within its lease and a second; and it hears of it itself, by its own clock."""
    first = WAYS[way]
    reconnected = Fault(Kind.BLACKHOLE, up=first.up, after=0, seconds=FOR_EVER_S, both=first.both)

    def plan(rank: int, number: int) -> Fault:
        if rank != _CUT_OFF:
            return HEALTHY
        return first if number == 0 else reconnected

    with proxy(service.address, _WORLD, plan) as between:
        options = {"timeout": _TIMEOUT_S}
        name = f"gone-{way}"
        job = Job(name, team, between.addresses, tmp_path, seed=SEED, until=10_000, options=options)
        job.expect("joined")
        job.until(lambda: between.latest > 0, "the rank is cut off")
        began = between.latest
        for rank in (0, 2):
            failure = team[rank].expect("told")
            assert failure["when"] - began <= SHORT_LEASE_S + 1.0
            assert (failure["kind"], failure["ranks"]) == ("PeerLostError", [_CUT_OFF])
            assert f"rank {_CUT_OFF} (host " in failure["text"]
            assert f"pid {team[_CUT_OFF].pid})" in failure["text"]
        assert team[_CUT_OFF].expect("told")["when"] - began <= _TIMEOUT_S + 2.0
