"""The daemon's named failpoints: whatever happens there, the job goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.seed import SEED
from support.fault.sweep import failpoints

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_a_kill_at_every_failpoint(tmp_path: Path) -> None:
    """The service kills itself at each of them; restarted, it goes on with the bits of a job left alone."""
    report = failpoints(tmp_path, SEED, 1, print, actions=("kill",))
    print(report)
    assert report.violations == []
