"""The contract of every transport, for the world of one."""

import pytest

from bnworker import World
from bnworker.transports.alone import AloneTransport
from support.contract import BODIES, names


@pytest.mark.parametrize("name", names("alone", 1))
def test_contract(name: str) -> None:
    """Each body passes where there is nobody else."""
    BODIES[name].run(World(AloneTransport(), install=False))
