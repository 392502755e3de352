"""Any number of processes over the service gives the bits of one process on the union of their batches."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnlayer import Alone
from support import same_bits
from support.service import daemon

pytestmark = pytest.mark.rpc


@pytest.fixture(scope="module")
def one_process() -> same_bits.Seen:
    """What one process sees, with all rows."""
    return same_bits.train(Alone())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of one service for all jobs."""
    with daemon() as at:
        yield at


def run(address: str, world_size: int, folder: Path, *arguments: str) -> None:
    """Run the ranks as processes that find the service, the job and their rank in the environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    environ |= {
        "BNLAYER_ADDRESS": address,
        "BNLAYER_JOB": folder.name,
        "BNLAYER_WORLD_SIZE": str(world_size),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, same_bits.__file__, folder, *arguments],
            env=environ | {"BNLAYER_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=200)
            assert rank.returncode == 0, err
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_can_not_be_seen(world_size: int, one_process: same_bits.Seen, address: str, tmp_path: Path) -> None:
    """Outputs, gradients, moving statistics and grids, over five steps of every family; a rank without a row too."""
    run(address, world_size, tmp_path)
    assert same_bits.union(same_bits.read(tmp_path, world_size)) == one_process


def test_without_exchanges_every_case_differs(one_process: same_bits.Seen, address: str, tmp_path: Path) -> None:
    """The comparison sees a missing exchange in each case, or it would prove nothing."""
    run(address, 2, tmp_path, "cut")
    for rank in same_bits.read(tmp_path, 2):
        assert all(rank[name][step][2:] != one_process[name][step][2:] for name in rank for step in range(5))
