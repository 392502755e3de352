"""`bnlayer train` over MPI: under our launcher and under mpiexec itself."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from bnworker.launcher.mpi import Vendor, environment
from support.training import FIFTY_STEPS, Trained, same_result, stopped, trained

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process on the same global batches."""
    return trained(tmp_path_factory.mktemp("alone"), "--transport=none", *FIFTY_STEPS)


def test_the_launchers_ranks(alone: Trained, tmp_path: Path) -> None:
    """Fifty float64 steps over MPI, against one process."""
    run = trained(tmp_path, "--transport=mpi", "--workers=2", *FIFTY_STEPS)
    assert (run.summary["transport"], run.summary["world_size"]) == ("mpi", 2)
    assert "[0] epoch 1/20  loss " in run.out
    same_result(alone, run)


def test_mpiexecs_own_ranks(alone: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpiexec -n 3 bnlayer train`: the command is a rank, and one rank alone shows and writes."""
    for name, value in environment(Vendor.OPEN_MPI, 99, tmp_path, {}).items():  # MPICH reads none of these
        monkeypatch.setenv(name, value)
    run = trained(tmp_path, *FIFTY_STEPS, before=[Path(sys.prefix, "bin", "mpiexec"), "-n", "3"])
    assert (run.summary["transport"], run.summary["world_size"]) == ("mpi", 3)
    assert run.out.count("epoch 1/20") == 1
    same_result(alone, run)


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    """Ctrl-C reaches the ranks at different moments; all end after the same step, and leave report and checkpoint."""
    run = stopped(tmp_path, signal.SIGINT, "--transport=mpi", "--workers=2")
    steps = run.tensors["bn_1/state/flags"].tolist()[-1]
    assert f"[0] bnlayer: train: SIGINT: stopped after step {steps:,}; " in run.err
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"<strong>It was stopped.</strong> SIGINT after step {steps:,}." in page
    assert "Error" not in run.err
