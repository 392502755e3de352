"""A rank and the service are lost at the same time: ranks that reconnect get an error that names the lost one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support.fault.daemons import daemon
from support.fault.jobs import Job
from support.fault.ranks import ranks
from support.fault.seed import SEED

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_WORLD = 3
_LOST = 1  # the rank
_LEASE_S = 2.0
_BACK_S = 2.0  # the promise: so long after the service listens again, whoever lives is back


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_the_service_is_away(number: signal.Signals, tmp_path: Path) -> None:
    """It gives no sign of life to the service that was started again: after a lease the others are told, by name."""
    with (
        daemon(tmp_path / "service", f"--lease={_LEASE_S:g}") as service,
        ranks(_WORLD, tmp_path / "ranks") as team,
    ):
        job = Job("both", team, [service.address], tmp_path, seed=SEED, until=10_000)
        job.expect("joined")
        job.await_progress([20] * _WORLD, quiet=team)
        service.kill()
        team[_LOST].signal(number)
        listens = service.start()
        for rank in (0, 2):
            failure = team[rank].expect("told")
            assert (failure["kind"], failure["ranks"]) == ("PeerLostError", [_LOST])
            assert f"pid {team[_LOST].pid})" in failure["text"]
            assert failure["when"] - listens <= _LEASE_S + _BACK_S
