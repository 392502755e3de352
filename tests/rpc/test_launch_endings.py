"""Every way in which a job over the service can end: exit code, what is said, and that nothing is left running."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.endings import Ending, endings, play, repeated

pytestmark = [pytest.mark.rpc, pytest.mark.fault]


@repeated
@endings("service")
def test_ending(ending: Ending, repetition: int, tmp_path: Path) -> None:
    """A row of the table in docs/launching.md holds."""
    play(ending, "service", tmp_path)
