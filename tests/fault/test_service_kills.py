"""A service that is killed with -9 at any moment: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.seed import SEED
from support.fault.service_kills import service_kills, storm

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_a_job_outlives_kills_of_the_service(tmp_path: Path) -> None:
    """The job goes on within 2 s, and its statistics are bit for bit those of a job that nobody disturbed."""
    report = service_kills(tmp_path, SEED, 4, print)
    print(report, *report.story, sep="\n")
    assert report.violations == []


def test_everything_at_once(tmp_path: Path) -> None:
    """The service is killed and stopped, and connections break: still nothing is lost or counted twice."""
    report = storm(tmp_path, SEED, 2, print)
    print(report, *report.story, sep="\n")
    assert report.violations == []
