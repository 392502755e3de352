"""Elastic jobs whose ranks are killed, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.processes import PYTHON, arguments

# Where in a step a rank can be killed.
BEFORE, BETWEEN, SUMMED, SAVED = "before the forward pass", "before the backward pass", "after the sums", "after a save"
POINTS = (BEFORE, BETWEEN, SUMMED, SAVED)
# What is lost there: the rank; all that runs on its host, and nobody is told, as when the power fails; or the way to
# the host, on which all goes on.
RANK, POWER, WAY = "the rank", "its host", "the way to its host"
COMMIT_EVERY = 5

RANKS = 4
TESTS = Path(__file__).parents[1]
_STEPS_PER_KILL = 6
PROGRAM = Path(__file__).with_name("elastic_rank.py")

Kill = tuple[int, int, str]


@dataclass(frozen=True)
class Run:
    """What an elastic job left.

    Attributes:
        code: the launcher's.
        lines: what the ranks printed, as JSON.
        err: what the launcher and the ranks wrote besides.
        killed: when each planned kill was done, and in which generation.
    """

    code: int
    lines: list[dict[str, object]]
    err: str
    killed: list[tuple[float, int]]

    @property
    def digests(self) -> set[object]:
        """Of the state with which the ranks ended."""
        return {line["ends"] for line in self.lines if "ends" in line}

    @property
    def gaps(self) -> list[float]:
        """Seconds from each kill until all that were left had made another step."""
        times: dict[int, float] = {}
        for line in self.lines:
            if "goes_on" in line:
                number = int(str(line["goes_on"]))
                times[number] = max(times.get(number, 0.0), float(str(line["time"])))
        return [times[min(number for number in times if number > last)] - when for when, last in self.killed]


def planned(kills: int, seed: int) -> tuple[list[Kill], int]:
    """Kills of ranks at random, each at a step of its own; and how many steps the job makes."""
    rng = np.random.default_rng(seed)
    steps = [1 + int(rng.integers(_STEPS_PER_KILL - 2)) + _STEPS_PER_KILL * number for number in range(kills)]
    return [(int(rng.integers(RANKS)), step, str(rng.choice(POINTS))) for step in steps], _STEPS_PER_KILL * (kills + 1)


def run(folder: Path, ranks: int, elastic: str, steps: int, kills: list[Kill], *options: str) -> Run:
    """An elastic job from start to end."""
    folder.mkdir(parents=True)
    program = (PYTHON, str(PROGRAM), str(folder), str(steps), str(ranks))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    done = subprocess.run(
        arguments(ranks, *program, options=["--elastic", elastic, *options]),
        env={**environ, "BNLAYER_TEST_KILLS": json.dumps(kills), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=200 + 30 * len(kills),
        check=False,
    )
    lines = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if "] {" in line]
    marks = sorted(folder.glob("kill-*"), key=lambda mark: int(mark.name.removeprefix("kill-")))
    killed = [mark.read_text().split() for mark in marks]
    return Run(done.returncode, lines, done.stderr, [(float(when), int(generation)) for when, generation in killed])
