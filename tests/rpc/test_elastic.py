"""Elastic jobs: ranks are lost, others join, and the job ends with the bits of one that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.elastic import RANKS, planned, run
from support.killing import killed_and_going_on

pytestmark = pytest.mark.rpc


@pytest.mark.fault
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_ranks_are_killed(kills: int, tmp_path: Path) -> None:
    """With -9, anywhere in a step: the others go on, and with those that are started again make the very same sums."""
    plan, steps = planned(kills, seed=kills)
    alone = run(tmp_path / "alone", 1, f"1:{RANKS}", steps, [])
    parts = run(tmp_path / "parts", RANKS, f"2:{RANKS}", steps, plan, f"--max-restarts={kills}")
    print(f"from each kill to the next step: {', '.join(f'{gap:.2f}' for gap in parts.gaps)} s")
    assert parts.code == 0, parts.err
    assert len(parts.killed) == kills
    assert parts.digests == alone.digests
    assert parts.err.count("it is started again (restart ") == kills
    # A loss, and the rank that comes back: two generations each, or one where it was back so soon.
    last = max(int(str(line["generation"])) for line in parts.told if "generation" in line)
    assert kills + 1 <= last <= 2 * kills + 1


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_training_goes_on(kills: int, tmp_path: Path) -> None:
    """`train --elastic`, one rank of four killed after the other: as accurate as a run that nobody disturbed."""
    whole, parts, output = killed_and_going_on(tmp_path, kills, seed=kills)
    print(f"accuracy {whole:.4f} undisturbed, {parts:.4f} after {kills} kills")
    assert output.count("it is started again (restart ") == kills
    assert "resumed after step" in output
    assert abs(whole - parts) < 0.005
