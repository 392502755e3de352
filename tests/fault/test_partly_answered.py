"""The service is killed after it has answered one or two of the ranks of an exchange, and not the others.

Layers' exchanges are in the journal by then; plain ones are not, and the ranks that were answered repeat them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bnserver.failpoints import VARIABLE
from support.fault.daemons import Daemon, daemon
from support.fault.history import Record
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.ranks import Rank, ranks
from support.fault.seed import SEED

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_WORLD = 3
_STEPS = 8
_OPTIONS = {"large_every": 6}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """The same ranks in all tests here, each with a job of its own."""
    with ranks(_WORLD, tmp_path_factory.mktemp("ranks")) as workers:
        yield workers


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests here, started again and again."""
    with daemon(tmp_path_factory.mktemp("service")) as one:
        yield one


@pytest.fixture(scope="module")
def undisturbed(service: Daemon, team: list[Rank], tmp_path_factory: pytest.TempPathFactory) -> list[list[Record]]:
    """What the ranks see in a job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job("whole", team, [service.address], folder, seed=SEED, until=_STEPS, options=_OPTIONS)
    job.expect("joined")
    job.finish()
    job.leave()
    return job.histories()


@pytest.mark.parametrize(
    ("kind", "failure"),
    [("allreduce", 1), ("allreduce large", 2), ("broadcast", 1), ("barrier", 2), ("sums forward", 1)],
)
def test_killed_between_two_answers(
    kind: str, failure: int, undisturbed: list[list[Record]], service: Daemon, team: list[Rank], tmp_path: Path
) -> None:
    """Nobody notices more than a pause."""
    name = f"{kind}-{failure}".replace(" ", "-")
    service.kill()
    service.start({VARIABLE: f"after-reply=kill:{_answers_before(undisturbed, kind) + failure}"})
    job = Job(name, team, [service.address], tmp_path, seed=SEED, until=_STEPS, options=_OPTIONS)
    job.expect("joined")
    job.until(lambda: not service.alive, "the service has killed itself", quiet=team)
    service.start()
    job.finish()
    job.leave()
    held = owner(service.address, name)
    assert check(job.histories(), held) == []
    assert held == owner(service.address, "whole")


def _answers_before(histories: Sequence[Sequence[Record]], kind: str) -> int:
    """How many answers the ranks of a job get before the first one of an exchange of this kind."""
    before = _WORLD  # all have joined
    alone = [[record.op in ("push", "pull") for record in history] for history in histories]
    numbers = [number for number, own in enumerate(alone[0]) if not own]
    for count, number in enumerate(numbers):
        record = histories[0][number]
        if f"{record.op} {record.layer if record.op == 'allreduce' else record.direction}".strip() == kind:
            by_themselves = sum(_of_itself(own, count) for own in alone)
            return before + _WORLD * count + by_themselves
    raise AssertionError(f"no exchange of the kind {kind}")


def _of_itself(alone: Sequence[bool], joint: int) -> int:
    """How much a rank did by itself before the exchange of this number among those of all ranks."""
    seen = -1
    for number, own in enumerate(alone):
        seen += not own
        if seen == joint:
            return sum(alone[:number])
    raise AssertionError(f"there are fewer than {joint} exchanges")
