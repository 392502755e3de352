"""The programs in `examples/` run as they are, and say what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rpc

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LAUNCH = (sys.executable, "-m", "bnworker.cli", "launch")


def ran(*command: str | Path) -> str:
    """What a program printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_loop_of_ones_own() -> None:
    """Under forty lines; three ranks print what one does."""
    program = EXAMPLES / "own_loop.py"
    assert len(program.read_text(encoding="utf-8").splitlines()) < 40
    alone = ran(sys.executable, program)
    together = ran(*LAUNCH, "-n", "3", "--", sys.executable, program)
    assert together.replace("[0] ", "") == alone
    assert float(alone.split()[-5].removesuffix("%")) > 95


@pytest.mark.fault
def test_an_elastic_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three processes is killed: what is printed is what one process prints, but for the number of ranks."""
    program = EXAMPLES / "elastic_loop.py"
    alone = ran(*LAUNCH, "-n", "1", "--elastic", "1:1", "--", sys.executable, program)
    monkeypatch.setenv("CRASH_AT_STEP", "30")
    together = ran(*LAUNCH, "-n", "3", "--elastic", "2:3", "--", sys.executable, program)
    figures, ranks = [line.rpartition(", ")[0] for line in alone.splitlines()], together.splitlines()
    assert [line.rpartition(", ")[0] for line in ranks] == figures
    assert ranks[0].endswith(", 3 ranks")
    assert float(figures[-1].split()[3].removesuffix("%")) > 95


@pytest.mark.slow
def test_synchronized_is_one_process_and_plain_is_not(tmp_path: Path) -> None:
    """The experiment, with three workers and one epoch; its picture is drawn."""
    program = EXAMPLES / "many_workers" / "run.py"
    out = ran(sys.executable, program, "--workers", "3", "--epochs", "1", "--out", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    curves = result["test_accuracy"]
    assert curves["synchronized"] == curves["one process"]
    assert result["largest_difference_of_moving_statistics"] < 1e-9
    assert curves["synchronized"][-1] > curves["plain, statistics averaged"][-1] + 0.05
    assert "synchronized and one process: the same after every epoch;" in out
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_says_what_was_measured() -> None:
    """Its numbers are those of the committed result, and its picture is small enough to load at once."""
    result = json.loads((EXAMPLES / "many_workers" / "result.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, curve in result["test_accuracy"].items():
        assert f"| {name} | {curve[-1]:.1%} |" in readme
    assert result["synchronized_equals_one_process_after_every_epoch"] is True
    assert (ROOT / "docs" / "images" / "many_workers.png").stat().st_size <= 150 * 1024
