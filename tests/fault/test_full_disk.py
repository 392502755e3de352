"""A disk that is full while a job runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.full import full_disk
from support.fault.seed import SEED

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_a_full_disk_loses_nothing_silently(tmp_path: Path) -> None:
    """Full in both ways, with a kill meanwhile, later, or never: the job goes on, or every rank hears why not."""
    report = full_disk(tmp_path, SEED, 6, print)
    print(report, *report.story, sep="\n")
    assert report.violations == []
