"""The soak itself: it says its seed, counts what was wrong, and fails if something was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.fault import soak
from support.fault.report import Report, Times
from support.fault.soak import Progress, SoakRun

pytestmark = pytest.mark.fault


def _good(folder: Path, seed: int, amount: int, progress: Progress) -> Report:
    progress("half of it")
    return Report(f"good, seed {seed}", done=f"{amount} done", times=[Times("told", 1.0, 0.5, [0.5, 0.6, 9.0])])


def _slow(folder: Path, seed: int, amount: int, progress: Progress) -> Report:
    return Report("slow", times=[Times("told", 1.0, 1.0, [0.5, 0.6, 9.0])])


def _wrong(folder: Path, seed: int, amount: int, progress: Progress) -> Report:
    return Report("wrong", wrong=["one was lost"])


def _broken(folder: Path, seed: int, amount: int, progress: Progress) -> Report:
    raise OSError("no such port")


@pytest.mark.parametrize(
    ("campaign", "code", "output"),
    [
        (
            _good,
            0,
            "kept  good, seed 7: 5 done\n        told: p50 0.600, p99 9.000, max 9.000 s (n 3, promised p50 <= 1 s)",
        ),
        (_slow, 1, "WRONG slow: too slow: told: p50 0.600"),
        (_wrong, 1, "WRONG one was lost"),
        (_broken, 1, "OSError: no such port"),
    ],
)
def test_the_output_and_exit_code_of_the_soak(
    campaign: soak.Campaign, code: int, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken promise, a broken time limit and a campaign that breaks by itself make it fail, with what repeats it."""
    monkeypatch.setattr(soak, "CAMPAIGNS", {"one": SoakRun(campaign, 10, "kills")})
    monkeypatch.setattr(sys, "argv", ["soak"])
    monkeypatch.setenv("SOAK_SEED", "7")
    monkeypatch.setenv("SOAK_SCALE", "0.5")
    assert soak.main() == code
    out = capsys.readouterr().out
    assert "soak: seed 7, scale 0.5; again: make soak SOAK_SEED=7 SOAK_SCALE=0.5\n=== one: 5 kills\n" in out
    assert output in out
    assert ("again: make soak SOAK_SEED=7 SOAK_SCALE=0.5 SOAK=one\n" in out) is (code == 1)
