"""kill -9 of the service at any moment of a job: the job goes on, and ends with the bits of a job left alone.

Seen from outside only: a moment is drawn as a number of exchanges since the last restart and a delay below the time
that an exchange takes. The first blow falls into the joining; some restarts are killed in turn, before they listen.
In a storm the service is stopped (SIGSTOP) as often as it is killed, and connections break all the time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.fault.daemons import Daemon, daemon
from support.fault.faults import plan
from support.fault.history import first_after
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.proxy import Proxy, proxy
from support.fault.ranks import Rank, ranks
from support.fault.report import Report, Times
from support.fault.wire import AWAY

RESUMED_S = 2.0  # the promise: so long after the service listens again, every rank has completed an exchange
WORLD = 3
_STEPS_PER_BLOW = 5
_STEPS_MEANWHILE = 30  # for what the ranks do until a busy machine lets us strike
_MOST_EXCHANGES = 50  # between two blows: 4 steps, so that none comes after the last step
_LONGEST_DELAY_S = 0.012
_JOINING_S = 0.15
_STARTING_S = 0.6
_KILLED_TWICE = 0.25  # of the restarts
_LONGEST_STOP_S = 3.0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Blow:
    """What happens to the service once.

    Attributes:
        number: from 0.
        exchanges: how many come before, since it listened last.
        delay: seconds after that.
        second_kill: seconds after its restart at which it is killed once more; None: it is not.
        stopped: seconds for which it is stopped, instead of being killed; None: it is killed.
    """

    number: int
    exchanges: int
    delay: float
    second_kill: float | None
    stopped: float | None

    @classmethod
    def draw(cls, seed: int, number: int, *, stops: bool) -> Blow:
        """The blow of this number: a pure function of the seed."""
        rng = np.random.default_rng([seed, number])
        exchanges, share = int(rng.integers(_MOST_EXCHANGES)), float(rng.random())
        second_kill, stopped = float(rng.uniform(0, _STARTING_S)), float(rng.uniform(0, _LONGEST_STOP_S))
        delay = float(rng.uniform(0, _JOINING_S if number == 0 else _LONGEST_DELAY_S))
        return cls(
            number,
            0 if number == 0 else exchanges,
            delay,
            second_kill if share < _KILLED_TWICE else None,
            stopped if stops and number % 2 else None,
        )


def service_kills(folder: Path, seed: int, kills: int, progress: Progress) -> Report:
    """Kill the service so many times during one job of three ranks and five layers."""
    report = Report(f"kill -9 of the service, seed {seed}")
    resumed = Times("every rank has resumed after the service listens again", RESUMED_S)
    report.times.append(resumed)
    steps = _STEPS_MEANWHILE + _STEPS_PER_BLOW * kills
    with daemon(folder / "service") as service, ranks(WORLD, folder / "ranks") as team:
        try:
            job = Job("parts", team, [service.address], folder, seed=seed, until=steps)
            blows = [Blow.draw(seed, number, stops=False) for number in range(kills)]
            for moment in _struck(job, service, blows, report, progress):
                ends = [first_after(history, moment) for history in job.histories()]
                resumed.seconds += [end - moment for end in ends if end is not None]
            _ended_well(job, service, report)
            undisturbed_job = Job("whole", team, [service.address], folder, seed=seed, until=steps)
            undisturbed_job.expect("joined")
            undisturbed_job.finish()
            undisturbed_job.leave()
            held, undisturbed = owner(service.address, "parts"), owner(service.address, "whole")
            report.same("the owner's statistics, beside those of an undisturbed job", held, undisturbed)
        except AssertionError as error:
            report.add([f"{type(error).__name__}: {error}", *report.story[-3:], service.output()])
    report.done = f"{len(report.story)} kills in a job of {steps} steps"
    return report


def storm(folder: Path, seed: int, blows: int, progress: Progress) -> Report:
    """Kill and stop the service in turns, so many times, while every connection breaks as the seed says."""
    report = Report(f"storm, seed {seed}")
    steps = _STEPS_MEANWHILE + _STEPS_PER_BLOW * blows
    with ExitStack() as stack:
        service = stack.enter_context(daemon(folder / "service", AWAY))
        team = stack.enter_context(ranks(WORLD, folder / "ranks"))
        between: Proxy = stack.enter_context(proxy(service.address, WORLD, lambda rank, count: plan(seed, rank, count)))
        try:
            job = Job("storm", team, between.addresses, folder, seed=seed, until=steps, options={"large_every": 20})
            drawn = [Blow.draw(seed, number, stops=True) for number in range(blows)]
            _struck(job, service, drawn, report, progress)
            _ended_well(job, service, report)
        except AssertionError as error:
            report.add([f"{type(error).__name__}: {error}", *report.story[-3:], *between.story[-5:], service.output()])
        report.done = f"{len(report.story)} blows and {between.struck.total()} broken connections in {steps} steps"
    return report


def _ended_well(job: Job, service: Daemon, report: Report) -> None:
    """Let the job come to its end, and judge it; what the service holds then outlives another kill."""
    job.finish()
    histories = job.histories()
    job.leave()
    held = owner(service.address, job.name)
    report.add(check(histories, held))
    service.kill()
    service.start()
    report.same("what outlives a kill after the last rank has left", owner(service.address, job.name), held)


def _struck(job: Job, service: Daemon, blows: Sequence[Blow], report: Report, progress: Progress) -> list[float]:
    """Strike the service, each time after the job has gone on; returns when it listened again after each kill."""
    moments = []
    floor = [0] * len(job.team)
    quiet: list[Rank] = []
    for blow in blows:
        job.await_progress([count + blow.exchanges if blow.number else 0 for count in floor], quiet)
        time.sleep(blow.delay)  # no matter where this hits it: that is what is tested
        _note(report, blow, job)
        if blow.stopped is not None:
            service.signal(signal.SIGSTOP)
            time.sleep(blow.stopped)
            service.signal(signal.SIGCONT)
        else:
            service.kill()
            service.begin()
            if blow.second_kill is not None:
                time.sleep(blow.second_kill)
                _note(report, blow, job)
                service.kill()
                service.begin()
            moments.append(service.listens())
        floor = [job.exchanges(rank) + 1 for rank in range(len(job.team))]
        job.await_progress(floor, quiet)
        progress(report.story[-1])
        if blow.number == 0:
            job.expect("joined")
            quiet = list(job.team)
    return moments


def _note(report: Report, blow: Blow, job: Job) -> None:
    what = "killed" if blow.stopped is None else f"stopped for {blow.stopped:.2f} s"
    done = [job.exchanges(rank) for rank in range(len(job.team))]
    report.story.append(f"{len(report.story) + 1}: the service is {what} after {done} exchanges")
