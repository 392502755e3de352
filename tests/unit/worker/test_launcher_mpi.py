"""Which mpiexec is found, and the variables that it gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnworker.launcher import mpi
from bnworker.launcher.mpi import Vendor

_FOLDER = Path("/launch")


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("HYDRA build details:\n    Version:  5.0.2\n", Vendor.MPICH),
        ("mpiexec (Open MPI) 5.0.11\n", Vendor.OPEN_MPI),
        ("mpiexec (OpenRTE) 4.1.4\n", Vendor.OPEN_MPI),
        ("prterun (PRRTE) 3.0\n", Vendor.OPEN_MPI),
        ("", Vendor.OTHER),
    ],
)
def test_vendor(text: str, vendor: Vendor) -> None:
    """Its own words say whose it is."""
    assert mpi.vendor(text) is vendor


def test_mpich_needs_nothing() -> None:
    """Variables that nothing reads would only mislead."""
    assert mpi.environment(Vendor.MPICH, 99, _FOLDER, {}) == {}


def test_open_mpi_beyond_the_cores() -> None:
    """More ranks than cores must be allowed, and must not spin; what the user set is left alone."""
    many = len(os.sched_getaffinity(0)) + 1
    needed = mpi.environment(Vendor.OPEN_MPI, many, _FOLDER, {"OMPI_MCA_mpi_yield_when_idle": "0"})
    assert needed["PRTE_MCA_rmaps_default_mapping_policy"] == ":oversubscribe"
    assert "OMPI_MCA_mpi_yield_when_idle" not in needed
    assert "PRTE_MCA_rmaps_default_mapping_policy" not in mpi.environment(Vendor.OPEN_MPI, 1, _FOLDER, {})


def test_open_mpi_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, and root alone, is allowed."""
    both = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert both.items() <= mpi.environment(Vendor.OPEN_MPI, 1, _FOLDER, {}).items()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert not both.keys() & mpi.environment(Vendor.OPEN_MPI, 1, _FOLDER, {}).keys()
