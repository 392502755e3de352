"""What a run shows: a bar on a terminal, lines in a pipe, a table at the end."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from bnworker import cli
from bnworker.cli.commands import app
from bnworker.cli.display import Display, show_calibration
from bnworker.cli.forecast import show
from bnworker.train.data import load
from bnworker.train.events import Event, Resumed, Saved
from bnworker.train.settings import Settings
from support.events import STEPS_PER_EPOCH, epoch, run, step


def shown(events: list[Event], epochs: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a display writes."""
    with Display(epochs * STEPS_PER_EPOCH, epochs, plain=False) as display:
        for event in events:
            display.watch(event)
    return capsys.readouterr().out


def test_lines_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One an epoch, no control characters; a checkpoint is not worth one."""
    assert shown([*run(2), Saved(10)], 2, capsys) == (
        "epoch 1/2  loss 1.0000  accuracy 25.00%  800 rows/s\nepoch 2/2  loss 0.5000  accuracy 62.50%  800 rows/s\n"
    )


def test_a_resumed_run_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """With the step that it goes on from."""
    out = shown([Resumed(7, (epoch(1),)), step(8), epoch(2)], 2, capsys)
    assert out.splitlines()[0] == "resumed after step 7"


@pytest.mark.parametrize(
    ("columns", "last"),
    [
        ("80", r"epoch 2/2 ━+ loss 4\.4868  accuracy 0\.4%  800 rows/s \d\d:\d\d"),
        ("120", r"epoch 2/2 ━+ 10/10 loss 4\.4868  accuracy 0\.4% \(test 62\.5%\)  800 rows/s \d\d:\d\d"),
    ],
)
def test_a_bar_on_a_terminal(
    columns: str, last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epoch, bar, loss, accuracy, speed and time: in one line of any terminal."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    out = shown(run(2), 2, capsys)
    drawn = [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)) if line.strip()]
    assert re.fullmatch(last, drawn[-1].strip()), drawn[-1]
    assert all(len(line) <= int(columns) for line in drawn)
    assert " left" in drawn[0]


# ---- text is never markup ----

_ODD = "[red]x[/red] [mpich] :car: [/]"


def test_a_result_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets of a folder's name were taken for colours, or ended the command with an error of rich."""
    monkeypatch.setenv("COLUMNS", "200")
    counts = ("world_size", "rows_per_second", "bytes_sent", "bytes_received", "waiting_seconds", "replicas", "steps")
    summary = {**dict.fromkeys(counts, 1), "data": _ODD, "transport": _ODD, "exchanges": {}}
    outcome: Any = SimpleNamespace(
        epochs=(epoch(1),), seconds=1.0, kept=1, test_accuracy=0.5, test_loss=0.5, resumed_steps=0, labels=(0, 1)
    )
    with Display(1, 1, plain=False) as display:
        display.table(outcome, summary)
    out = capsys.readouterr().out
    assert f"{_ODD}: 1 steps" in out
    assert f"1 ({_ODD})" in out


def test_a_calibration_shows_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be called anything."""
    monkeypatch.setenv("COLUMNS", "200")
    scores = SimpleNamespace(test_accuracy=0.5, test_loss=0.5)
    result: Any = SimpleNamespace(rows=3, before=scores, after=scores)
    show_calibration(result, Path(_ODD))
    assert f"in {Path(_ODD)}" in " ".join(capsys.readouterr().out.split())


def test_a_plan_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so may the data."""
    monkeypatch.setenv("COLUMNS", "200")
    show(Settings(), replace(load("digits", "float32"), name=_ODD), 2, "service", None)
    assert capsys.readouterr().out.startswith(f"{_ODD}: nothing was started")


def test_the_doctor_shows_what_it_finds_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install 'bnlayer[mpich]'` lost its brackets."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.modules["bnworker.cli.doctor"], "_mpiexec", lambda: _ODD)
    failed = subprocess.CompletedProcess((), 1, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    out = CliRunner().invoke(app, ["doctor"]).stdout
    assert _ODD in out
    assert "pip install 'bnlayer[mpich]' brings one" in out


def test_nothing_else_makes_a_console() -> None:
    """One place says what is markup: nothing is."""
    package = Path(cli.__file__).parents[1]
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert ("Console(" in text or "rich import print" in text) == (file.name == "console.py"), file
        assert text.count("TextColumn(") == text.count("markup=False)") or file.name == "console.py", file
