"""`bnlayer train --report --tensorboard`: what several ranks leave, and what it costs: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.training import trained

pytestmark = pytest.mark.rpc

SMALL = ("--workers=2", "--epochs=3", "--batch-size=200", "--hidden=12,6")


def test_a_report_changes_nothing(tmp_path: Path) -> None:
    """The same bits, and the same exchanges, as without one; page, pictures and event files are there."""
    plain = trained(tmp_path / "plain", *SMALL)
    report, events = tmp_path / "deep" / "report", tmp_path / "events"
    seen = trained(tmp_path / "seen", *SMALL, f"--report={report}", f"--tensorboard={events}")
    assert seen.tensors.keys() == plain.tensors.keys()
    assert all(seen.tensors[name].tobytes() == plain.tensors[name].tobytes() for name in plain.tensors)
    assert seen.summary["exchanges"] == plain.summary["exchanges"]
    names = ["index.html", "layer_bn_1.png", "layer_bn_2.png", "learning.png", "waiting.png"]
    assert sorted(path.name for path in report.iterdir()) == names
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "2 (service)" in page
    assert f"{seen.summary['test_accuracy']:.2%}" in page
    assert seen.out.endswith(f"report: {report / 'index.html'}\n")
    assert [path.name.startswith("events.out.tfevents.") for path in events.iterdir()] == [True]


def test_a_run_that_failed_is_reported_too(tmp_path: Path) -> None:
    """The page says why it ended, which is when one wants to look at it."""
    report = tmp_path / "report"
    trained(tmp_path, *SMALL, "--learning-rate=1e30", f"--report={report}", code=1)
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "<strong>It failed.</strong> DivergedError: The loss of step" in page
    assert "--learning-rate" in page
