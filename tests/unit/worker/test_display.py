"""What a run shows: a bar on a terminal, lines in a pipe, a table at the end."""

from __future__ import annotations

import re

import pytest

from bnworker.cli.display import Display
from bnworker.train.events import Event, Resumed, Saved
from support.events import STEPS_PER_EPOCH, epoch, run, step


def shown(events: list[Event], epochs: int, capsys: pytest.CaptureFixture[str], *, first: bool = True) -> str:
    """What a display writes."""
    with Display(epochs * STEPS_PER_EPOCH, epochs, shown=first, plain=False) as display:
        for event in events:
            display.watch(event)
    return capsys.readouterr().out


def test_lines_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """One an epoch, no control characters; a checkpoint is not worth one."""
    assert shown([*run(2), Saved(10)], 2, capsys) == (
        "epoch 1/2  loss 1.0000  accuracy 25.00%  800 rows/s\nepoch 2/2  loss 0.5000  accuracy 62.50%  800 rows/s\n"
    )


def test_a_resumed_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """With the step that it goes on from."""
    out = shown([Resumed(7, (epoch(1),)), step(8), epoch(2)], 2, capsys)
    assert out.splitlines()[0] == "resumed after step 7"


def test_only_one_rank_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    """The others are silent."""
    assert shown(run(2), 2, capsys, first=False) == ""


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
