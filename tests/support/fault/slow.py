"""Slow is not dead: both cores are saturated, a rank holds the interpreter's lock for seconds, and nobody is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.fault.daemons import daemon
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.ranks import ranks
from support.fault.report import Report

WORLD = 2
HOLD_S = 3.0
_BURN = "while True: pass"
_TELL_EVERY = 1000  # exchanges
_LEAST_EXCHANGES = 10  # of a step: five layers, both directions

Progress = Callable[[str], None]


@contextmanager
def saturated() -> Iterator[None]:
    """Every core is busy for the length of a `with` block."""
    command = [sys.executable, "-c", _BURN]
    burners = [subprocess.Popen(command) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
        for burner in burners:
            burner.wait()


def slow_is_not_dead(folder: Path, seed: int, steps: int, progress: Progress, every: int = 500) -> Report:
    """Train for so many steps; rank 1 holds its interpreter's lock for 3 s after every so many."""
    report = Report(f"slow is not dead, seed {seed}")
    options = {1: {"hold_every": every, "hold_s": HOLD_S}}
    with daemon(folder / "service") as service, ranks(WORLD, folder / "ranks") as team:
        job = Job("slow", team, [service.address], folder, seed=seed, until=steps, own=options)
        try:
            with saturated():
                job.expect("joined")
                for count in range(_TELL_EVERY, steps * _LEAST_EXCHANGES, _TELL_EVERY):
                    job.await_progress([count] * WORLD, quiet=team)
                    progress(f"{count} exchanges")
                job.finish()
            histories = job.histories()
            job.leave()
            report.add(check(histories, owner(service.address, "slow")))
            longest = max(record.end - record.begin for record in histories[0])
            report.done = f"{steps} steps, {steps // every} holds of {HOLD_S:g} s; the longest wait was {longest:.2f} s"
            if longest < HOLD_S / 2:
                report.add(["nobody waited for the rank that held its lock: the test does not test"])
        except AssertionError as error:
            report.add([str(error), service.output()])
    return report
