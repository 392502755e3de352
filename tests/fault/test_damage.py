"""Damaged files: a clear error, or a state of before; never a silent loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault.damage import LayerSnapshot, cut, flipped, layer_snapshot
from support.fault.seed import SEED

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_SHARE = 0.05  # of all bytes; `make soak` takes all


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> LayerSnapshot:
    """What is damaged."""
    return layer_snapshot(tmp_path_factory.mktemp("kept"), SEED)


def test_a_flipped_byte_is_noticed(before: LayerSnapshot, tmp_path: Path) -> None:
    """Wherever it is: the service refuses to begin, and names the file."""
    report = flipped(tmp_path, SEED, _SHARE, print, before)
    print(report)
    assert report.violations == []


def test_a_journal_without_its_end_is_one_of_before(before: LayerSnapshot, tmp_path: Path) -> None:
    """Cut anywhere: what was whole is kept, in order; a snapshot that lacks a byte is refused."""
    report = cut(tmp_path, SEED, _SHARE, print, before)
    print(report)
    assert report.violations == []
