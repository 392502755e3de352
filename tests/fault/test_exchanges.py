"""Connections that break in every way: exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.seed import SEED
from support.fault.wire import exchanges_under_faults

pytestmark = [pytest.mark.fault, pytest.mark.rpc]


def test_nothing_is_lost_and_nothing_counted_twice(tmp_path: Path) -> None:
    """Three hundred exchanges behind a proxy that delays, cuts, half-closes, swallows and loses replies."""
    report = exchanges_under_faults(tmp_path, SEED, 300, print)
    print(report, *report.story, sep="\n")
    assert report.violations == []
