"""A rank that is killed or frozen: the survivors' errors name it, and where it was, in time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from support.fault.rank_kills import rank_kills
from support.fault.seed import SEED
from support.fault.soak import SHORT_LEASE_S

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_a_killed_rank_is_reported_within_a_second(tmp_path: Path) -> None:
    """kill -9 of a rank that waits, that computes, and of one anywhere: both survivors hear its name, host and pid."""
    report = rank_kills(tmp_path, SEED, 3, signal.SIGKILL, None, print)
    print(report)
    assert report.violations == []


def test_a_frozen_rank_is_reported_within_its_lease_and_a_second(tmp_path: Path) -> None:
    """SIGSTOP, likewise; and who was frozen hears of it, once it wakes up."""
    report = rank_kills(tmp_path, SEED, 3, signal.SIGSTOP, SHORT_LEASE_S, print)
    print(report)
    assert report.violations == []


def test_a_frozen_rank_is_reported_within_the_default_lease(tmp_path: Path) -> None:
    """What docs/service.md promises where nobody chose a lease."""
    report = rank_kills(tmp_path, SEED, 1, signal.SIGSTOP, None, print)
    print(report)
    assert report.violations == []
