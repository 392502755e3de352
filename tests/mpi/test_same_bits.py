"""Any number of ranks under mpiexec gives the bits of one process on the union of their batches."""

from pathlib import Path

import pytest

from bnlayer import Alone
from support import mpi, same_bits

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def one_process() -> same_bits.Seen:
    """What one process sees, with all rows."""
    return same_bits.train(Alone())


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_do_not_change_the_result(world_size: int, one_process: same_bits.Seen, tmp_path: Path) -> None:
    """Outputs, gradients, moving statistics and grids, over five steps of every family; a rank without a row too."""
    ended = mpi.run(world_size, same_bits.__file__, tmp_path, limit_s=200)
    assert ended.code == 0, ended.err
    assert same_bits.union(same_bits.read(tmp_path, world_size)) == one_process


def test_without_exchanges_every_case_differs(one_process: same_bits.Seen, tmp_path: Path) -> None:
    """The comparison sees a missing exchange in each case, or it would prove nothing."""
    ended = mpi.run(2, same_bits.__file__, tmp_path, "cut")
    assert ended.code == 0, ended.err
    for rank in same_bits.read(tmp_path, 2):
        assert all(rank[name][step][2:] != one_process[name][step][2:] for name in rank for step in range(5))
