"""`bnlayer train --report --tensorboard`: what several ranks leave, and what it costs: nothing."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from support.training import stopped, trained

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
    """A loss that is not finite: a line for each rank, no summary, and a page that says why it ended."""
    report = tmp_path / "report"
    run = trained(tmp_path, *SMALL, "--learning-rate=1e30", f"--report={report}", code=1)
    for rank, prefix in enumerate(("", r"\[1\] ")):
        line = rf"^{prefix}bnlayer: train: rank {rank}: DivergedError: The loss of step \d+ is"
        assert len(re.findall(line, run.err, re.MULTILINE)) == 1, run.err
    assert "Traceback" not in run.err
    assert not (tmp_path / "out" / "summary.json").exists()
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "<strong>It failed.</strong> DivergedError: The loss of step" in page
    assert "--learning-rate" in page


@pytest.mark.parametrize(
    ("number", "rank", "options"),
    [
        (signal.SIGINT, None, ["--workers=2"]),
        (signal.SIGINT, 1, ["--workers=2"]),
        (signal.SIGTERM, None, ["--transport=none"]),
        (signal.SIGTERM, None, ["--workers=2"]),
        (signal.SIGUSR1, 1, ["--workers=2"]),
    ],
    ids=["ctrl-c", "one rank alone", "a single process", "pre-empted", "SIGUSR1, one rank alone"],
)
def test_a_run_that_was_stopped_is_reported_too(
    number: signal.Signals, rank: int | None, options: list[str], tmp_path: Path
) -> None:
    """All ranks end after the same step: the report says so, the checkpoint is of that step and is gone on from."""
    run = stopped(tmp_path, number, *options, rank=rank)
    line = r"^bnlayer: train: (SIG\w+): stopped after step (\d+); (.*) goes on .* --resume$"
    reported = re.findall(line, run.err, re.MULTILINE)
    assert [(by, path) for by, _, path in reported] == [(number.name, str(tmp_path / "saved.safetensors"))]
    steps = int(reported[0][1])
    assert steps >= 10
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"<strong>It was stopped.</strong> {number.name} after step {steps:,}." in page
    assert (tmp_path / "report" / "learning.png").exists()
    assert run.tensors["bn_1/state/flags"].tolist()[-1] == steps
    assert not (tmp_path / "summary.json").exists()
    assert "bnlayer launch" not in run.err and "Error" not in run.err
