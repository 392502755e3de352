"""Faults on purpose: exactly those that were asked for."""

import os
import signal
from pathlib import Path

import pytest

from bnserver.failpoints import POINTS, VARIABLE, FailpointError, Failpoints


def test_without_the_variable_nothing_happens() -> None:
    """However often each point is reached."""
    points = Failpoints(dict.fromkeys(("PATH", "HOME"), "kill"))
    for name in POINTS:
        assert not points.armed(name)
        assert not any(points.reached(name) for _ in range(100))


def test_a_point_fails_at_its_hit_alone() -> None:
    """Counted from 1, each point by itself; several faults at one point."""
    points = Failpoints({VARIABLE: "before-reply=drop:3, before-reply=drop:5,in-journal=full"})
    assert [points.reached("before-reply") for _ in range(6)] == [False, False, True, False, True, False]
    with pytest.raises(OSError, match="No space left on device"):
        points.reached("in-journal")
    assert not points.reached("in-journal")
    assert points.armed("before-reply") and not points.armed("tick")


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_go_to_the_process_itself(action: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And to nobody else."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    Failpoints({VARIABLE: f"tick={action}"}).reached("tick")
    assert sent == [(os.getpid(), number)]


@pytest.mark.parametrize("word", ["nowhere=kill", "tick", "tick=", "tick=explode", "tick=kill:x", "tick=kill:-1"])
def test_what_has_no_meaning_is_refused(word: str) -> None:
    """A fault that is never injected would be a test that tests nothing."""
    with pytest.raises(FailpointError, match=rf"expected NAME=ACTION\[:HIT\] .* received '{word}'"):
        Failpoints({VARIABLE: f"tick=kill,{word}"})


def test_every_point_is_in_the_documentation() -> None:
    """And no other."""
    text = (Path(__file__).parents[3] / "docs" / "promises.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in POINTS)
