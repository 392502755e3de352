"""MPI 4 has persistent collectives, older ones have not."""

from pathlib import Path

import pytest

from support import mpi

pytestmark = pytest.mark.mpi


def test_without_persistent_collectives() -> None:
    """The header is a collective like any other then: sums, agreement and the end are the same."""
    ended = mpi.run(2, Path(__file__).with_name("older_rank.py"))
    assert ended.code == 0, ended.err
    sums = "[[1, 1, 1], [3, 3, 3], [5, 5, 5]]"
    assert sorted(ended.out.splitlines()) == sorted(
        f"{rank}: {sums}{end}" for rank in (0, 1) for end in ("", ", MismatchError")
    )
