"""kill -9 of the service at any moment of a job: the job goes on, and ends with the bits of a job left alone.

Seen from outside only: a moment is drawn as a number of exchanges since the last restart and a delay below the time
that an exchange takes. The first kill falls into the joining; some restarts are killed in turn, before they listen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from support.fault.daemons import Daemon, daemon
from support.fault.history import first_after
from support.fault.jobs import Job, owner
from support.fault.model import Owned, check
from support.fault.ranks import Rank, ranks
from support.fault.report import Report, Times

RESUMED_S = 2.0  # the promise: so long after the service listens again, every rank has completed an exchange
WORLD = 3
_STEPS_PER_KILL = 6
_MOST_EXCHANGES = 50  # between two kills: 4 steps, so that none comes after the last step
_LONGEST_DELAY_S = 0.012
_JOINING_S = 0.15
_STARTING_S = 0.6
_KILLED_AGAIN = 0.25  # of the restarts

Progress = Callable[[str], None]


def steps_for(kills: int) -> int:
    """How many steps a job has, so that so many kills fall into it."""
    return 10 + _STEPS_PER_KILL * kills


def undisturbed(folder: Path, seed: int, steps: int) -> dict[str, Owned]:
    """What the service holds after a job that nobody disturbs."""
    with daemon(folder / "service") as service, ranks(WORLD, folder / "ranks") as team:
        job = Job("whole", team, [service.address], folder, seed=seed, until=steps)
        job.hear("joined")
        job.hear("reached")
        job.leave()
        return owner(service.address, "whole")


def service_kills(folder: Path, seed: int, kills: int, progress: Progress) -> Report:
    """Kill the service so many times during one job of three ranks and five layers."""
    report = Report(f"kill -9 of the service, seed {seed}")
    resumed = Times("every rank has resumed after the service listens again", RESUMED_S)
    report.times.append(resumed)
    steps = steps_for(kills)
    with daemon(folder / "service") as service, ranks(WORLD, folder / "ranks") as team:
        job = Job("parts", team, [service.address], folder, seed=seed, until=steps)
        try:
            moments = _killed(job, service, seed, kills, report, progress)
            job.hear("reached")
            histories = job.histories()
            report.add(check(histories))
            for moment in moments:
                ends = [first_after(history, moment) for history in histories]
                resumed.seconds += [end - moment for end in ends if end is not None]
            job.leave()
            held = owner(service.address, "parts")
            service.kill()
            service.start()
            report.same("what outlives a kill after the last rank has left", owner(service.address, "parts"), held)
            report.add(check(histories, held))
            whole = undisturbed(folder / "whole", seed, steps)
            report.same("the owner's statistics, beside those of the undisturbed job", held, whole)
        except AssertionError as error:
            report.add([f"{type(error).__name__}: {error}", *report.story[-3:], service.said()])
    report.done = f"{len(report.story)} kills in a job of {steps} steps"
    return report


def _killed(job: Job, service: Daemon, seed: int, kills: int, report: Report, progress: Progress) -> list[float]:
    """Kill and restart; returns when the service listened again, each time that nobody killed it before."""
    rng = np.random.default_rng(seed)
    moments = []
    floor = [0] * len(job.team)
    quiet: list[Rank] = []
    for number in range(kills):
        exchanges, delay = int(rng.integers(_MOST_EXCHANGES)), float(rng.uniform(0, _LONGEST_DELAY_S))
        again, later = rng.random() < _KILLED_AGAIN, float(rng.uniform(0, _STARTING_S))
        if number == 0:
            delay = float(rng.uniform(0, _JOINING_S))
        else:
            job.await_progress([count + exchanges for count in floor], quiet)
        time.sleep(delay)  # no matter where this hits it: that is what is tested
        service.kill()
        report.story.append(f"kill {len(report.story) + 1}: {[job.exchanges(rank) for rank in range(WORLD)]} exchanges")
        service.begin()
        if again:
            time.sleep(later)
            service.kill()
            report.story.append(f"kill {len(report.story) + 1}: {later:.3f} s after its restart")
            service.begin()
        moments.append(service.listens())
        floor = [job.exchanges(rank) + 1 for rank in range(WORLD)]
        job.await_progress(floor, quiet)
        progress(report.story[-1])
        if number == 0:
            job.hear("joined")
            quiet = list(job.team)
    return moments
