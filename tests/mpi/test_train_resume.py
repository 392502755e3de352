"""Training over MPI that is killed and goes on, and files that go from one transport to the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.killing import KILLS, killed_and_resumed, undisturbed
from support.training import FIFTY_STEPS, trained

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]


@pytest.mark.fault
@pytest.mark.parametrize("kills", [2, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_kills(kills: int, tmp_path: Path) -> None:
    """Of ranks and of the launcher, with -9: the final file's bytes are those of the undisturbed run."""
    parts, steps, story = killed_and_resumed(tmp_path, "mpi", kills, seed=kills)
    print("\n".join(story))
    assert parts == undisturbed(tmp_path, "mpi", steps)


def test_the_transport_does_not_change_the_result(tmp_path: Path) -> None:
    """Twenty steps over MPI, the rest through the service: the bytes of a run through the service alone."""
    options = ("--workers=4", "--resume", *FIFTY_STEPS)  # of three, MPI itself would add in rank order
    trained(tmp_path / "service", *options)
    trained(tmp_path / "mixed", "--transport=mpi", *options, "--steps=20")
    mixed = trained(tmp_path / "mixed", *options)
    assert (mixed.summary["resumed_steps"], mixed.summary["transport"]) == (20, "service")
    files = [(tmp_path / name / "out" / "saved.safetensors").read_bytes() for name in ("service", "mixed")]
    assert files[0] == files[1]
