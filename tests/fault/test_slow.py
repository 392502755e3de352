"""Slow is not dead."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.seed import SEED
from support.fault.slow import slow_is_not_dead

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_a_busy_rank_is_not_taken_for_dead(tmp_path: Path) -> None:
    """All cores are saturated, and a rank's threads stand still for 3 s at a time: the job goes on."""
    report = slow_is_not_dead(tmp_path, SEED, 20, print, every=15)
    print(report)
    assert report.violations == []
