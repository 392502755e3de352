"""Elastic jobs on two hosts, the second of which is lost again and again, and comes back each time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.elastic import POINTS, PROGRAM, RANKS, TESTS, WAY, Kill, planned
from support.hosts import NFT, Host
from support.processes import PYTHON
from support.running import Running
from support.service import daemon

_OURS = 2  # ranks on the host that stays, with the service
_LIMIT_S = 150.0


def losses(count: int, seed: int) -> tuple[list[Kill], int]:
    """Losses of the other host at random, each by one of its ranks, at a step of its own; and how many steps."""
    plan, steps = planned(count, seed)
    rng = np.random.default_rng([seed, 1])
    return [(_OURS + int(rng.integers(RANKS - _OURS)), step, str(rng.choice(POINTS))) for _, step, _ in plan], steps


@dataclass
class Story:
    """What became of a job.

    Attributes:
        codes: of the launchers that were not killed.
        lines: what the ranks printed, as JSON.
        gaps: seconds from each loss until the others had made another step.
        without: the generations that the others formed without the host that was lost.
        stranded: what the ranks wrote that were lost and lived on.
    """

    codes: list[int] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    without: list[int] = field(default_factory=list)
    stranded: str = ""


def run(folder: Path, on: Sequence[Host], what: str, plan: list[Kill], steps: int) -> Story:
    """A job from start to end, whose second host is lost as planned."""
    folder.mkdir(parents=True)
    story, ours, theirs = Story(), *on
    like_launchers = "--insecure", "--lease=4"
    with daemon(f"--listen={ours.address}:0", *like_launchers, prefix=ours.prefix) as address:
        started: list[Running] = []

        def start(host: Host, first: int) -> Running:
            environ = {
                "BNLAYER_INSECURE": "1",
                "BNLAYER_TEST_FIRST": first,
                "BNLAYER_TEST_KILLS": json.dumps(plan),
                "BNLAYER_TEST_LOSES": what,
                "PYTHONPATH": TESTS,
            }
            prefix = [*host.prefix, "env", *(f"{name}={value}" for name, value in environ.items())]
            program = (PYTHON, str(PROGRAM), str(folder), str(steps), str(RANKS))
            where = ["--elastic=2:4", "--max-restarts=0", f"--address={address}", "--job=j"]
            started.append(Running(_OURS, program, where, folder / f"logs-{len(started)}", prefix=prefix))
            return started[-1]

        try:
            stays, other = start(ours, 0), start(theirs, _OURS)
            for number in range(len(plan)):
                when, last = _mark(folder / f"kill-{number}", stays, other)
                others = _continued(stays, last)
                story.gaps.append(max(line["time"] for line in others) - when)
                story.without.append(others[0]["goes_on"])
                if what == WAY:
                    subprocess.run(["ip", "netns", "exec", theirs.namespace, NFT, "delete table inet lost"], check=True)
                else:
                    assert other.end() == 137
                    other.clean_up()
                    theirs.connect()
                    other = start(theirs, _OURS)
            story.codes = [stays.end(), other.end()]
            story.lines = [line for each in started for line in _lines(each.out.all())]
            story.stranded = other.err.all()
        finally:
            for each in started:
                each.clean_up()
    return story


def _mark(path: Path, *running: Running) -> tuple[float, int]:
    """When the next loss was, and in which generation."""
    deadline = time.monotonic() + _LIMIT_S
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, [each.err.so_far() for each in running]
        time.sleep(0.01)
    when, generation = path.read_text().split()
    return float(when), int(generation)


def _continued(stays: Running, last: int) -> list[dict[str, Any]]:
    """What those that are left tell of their first step without the others."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        lines = [line for line in _lines(stays.out.so_far()) if line.get("goes_on", 0) > last]
        for number in sorted({line["goes_on"] for line in lines}):
            first = [line for line in lines if line["goes_on"] == number]
            if len(first) == _OURS:
                return first
        assert time.monotonic() < deadline, stays.err.so_far()
        time.sleep(0.01)


def _lines(text: str) -> list[dict[str, Any]]:
    complete = text.rpartition("\n")[0].splitlines()
    return [json.loads(line.partition(" ")[2]) for line in complete if "] {" in line]
