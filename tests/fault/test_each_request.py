"""Each kind of request once: its reply is lost, or half of it arrives. It is sent again, and counts once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.fault.daemons import Daemon, daemon
from support.fault.faults import HEALTHY, Fault, Kind
from support.fault.history import Record
from support.fault.jobs import Job, owner
from support.fault.model import Owned, check
from support.fault.proxy import proxy
from support.fault.ranks import Rank, ranks
from support.fault.seed import SEED

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_WORLD = 2
_STEPS = 10
_OPTIONS = {"large_every": 6}
_HALF = 40  # bytes: less than any request has
_KINDS = {
    "enroll", "probe forward", "sums forward", "probe backward", "sums backward", "allreduce", "allreduce large",
    "broadcast of 0", "barrier before", "push", "pull",
}  # fmt: skip

LOST_REPLY = Fault(Kind.LOST_REPLY, up=True)
HALF_A_REQUEST = Fault(Kind.CUT, up=True, after=_HALF)
HALF_A_REPLY = Fault(Kind.CUT, up=False, after=_HALF)


@dataclass(frozen=True)
class Undisturbed:
    """A job that nobody disturbed, and what it left to be compared with.

    Attributes:
        service, team: which go on with other jobs.
        owned: what the service held of it in the end.
        histories: what its ranks saw.
    """

    service: Daemon
    team: list[Rank]
    owned: dict[str, Owned]
    histories: list[list[Record]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    """One for all tests here."""
    folder = tmp_path_factory.mktemp("whole")
    # In so long a lease heartbeats are minutes apart: the next bytes are the request.
    with daemon(folder / "service", "--lease=600", "--away=10") as service, ranks(_WORLD, folder / "ranks") as team:
        job = Job("whole", team, [service.address], folder, seed=SEED, until=_STEPS, options=_OPTIONS)
        job.expect("joined")
        job.finish()
        job.leave()
        yield Undisturbed(service, team, owner(service.address, "whole"), job.histories())


@pytest.mark.parametrize("fault", [LOST_REPLY, HALF_A_REQUEST, HALF_A_REPLY], ids=["reply", "request", "half-reply"])
@pytest.mark.parametrize("struck", range(_WORLD))
def test_each_request_counts_once(fault: Fault, struck: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Of either rank: the one that came first waits for the other, the one that came last completes the exchange."""
    service, team = undisturbed.service, undisturbed.team
    pauses = _one_of_each(undisturbed.histories[struck])
    own = {struck: {"pauses": tuple(pauses)}}
    name = f"{fault.kind}-{fault.up}-{struck}"
    with proxy(service.address, _WORLD, lambda rank, number: HEALTHY) as between:
        job = Job(name, team, between.addresses, tmp_path, seed=SEED, until=_STEPS, options=_OPTIONS, own=own)
        job.expect("joined")
        for _ in pauses:
            team[struck].expect("paused")
            between.strike(struck, fault)
            team[struck].go_on()
        job.finish()
        assert between.struck == {fault.kind: len(pauses)}
        job.leave()
    held = owner(service.address, name)
    assert check(job.histories(), held) == []
    assert held == undisturbed.owned


def _one_of_each(history: list[Record]) -> list[int]:
    """The number of an exchange of each kind: the second, where there is one."""
    numbers: dict[str, list[int]] = {}
    for number, record in enumerate(history):
        name = record.layer if record.op in ("allreduce", "broadcast", "barrier") else record.direction
        numbers.setdefault(f"{record.op} {name}".strip(), []).append(number)
    assert set(numbers) >= _KINDS - {"push"}
    return sorted(positions[min(1, len(positions) - 1)] for positions in numbers.values())
