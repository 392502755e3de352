"""Every named failpoint of the daemon, with everything that can happen there: the job goes on, bit for bit.

The service is told by the environment where it fails. When it has killed itself it is started again; when it has
stopped itself it is woken up.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from bnserver.failpoints import POINTS, VARIABLE
from support.fault.daemons import Daemon
from support.fault.jobs import Job, owner
from support.fault.model import Owned, check
from support.fault.ranks import ranks
from support.fault.report import Report

WORLD = 3
_STEPS = 6  # some 75 exchanges
_STOPPED_S = 0.3
_MOST_JOBS = 4  # in which a point must be reached
_UNSEEN = ("drop", "full")  # actions that can't be seen from outside: one job is theirs

# How often a job of this length comes by, at least; 1 where it is not said.
_HITS = {
    "before-event": 200,
    "before-journal": 60,
    "in-journal": 60,
    "after-journal": 60,
    "before-reply": 200,
    "after-reply": 200,
    "tick": 4,
}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One failure.

    Attributes:
        point: where.
        action: what happens there.
        hit: the how manieth time.
    """

    point: str
    action: str
    hit: int

    def __str__(self) -> str:
        return f"{self.point}={self.action}:{self.hit}"


def cases(seed: int, hits: int) -> Iterator[Case]:
    """Every point with every action that it knows, each so many times.

    Args:
        seed: of the hits.
        hits: how many of each.
    """
    rng = np.random.default_rng(seed)
    for point in POINTS:
        for action in _actions(point):
            for _ in range(hits if point in _HITS else 1):
                yield Case(point, action, 1 + int(rng.integers(_HITS.get(point, 1))))


def _actions(point: str) -> tuple[str, ...]:
    own = {"before-reply": ("drop",), "in-journal": ("full",), "in-snapshot": ("full",)}
    return ("kill", "stop", *own.get(point, ()))


def failpoints(folder: Path, seed: int, hits: int, progress: Progress, actions: tuple[str, ...] = ()) -> Report:
    """Let the service fail at every point, so many times each, with every action or those named.

    One job comes after the other. The service that is started after a failure has the next one before it already.
    """
    report = Report(f"failpoints, seed {seed}")
    waiting = [case for case in cases(seed, hits) if not actions or case.action in actions]
    total = len(waiting)
    service = Daemon(folder / "service")
    failing = _Failing(service, waiting, progress)
    try:
        with ranks(WORLD, folder / "ranks") as team:
            failing.next()
            for number in count():
                job = Job(f"job-{number}", team, [service.address], folder, seed=seed + number, until=_STEPS)
                failing.attend(job)
                wrong = check(job.histories(), failing.owner(job))
                report.add([f"job {number}, after {failing.story[-3:]}: {line}" for line in wrong])
                if failing.case is None or report.wrong:
                    break
    except AssertionError as error:
        report.add([f"{failing.story[-3:]}: {error}", service.output()])
    finally:
        if service.alive:
            service.signal(signal.SIGCONT)
            service.kill()
    report.story = failing.story
    report.done = f"{len(failing.story)} of {total} cases at {len(POINTS)} points"
    return report


class _Failing:
    """A service that fails as it is told, and is helped up each time.

    Attributes:
        case: what it is to fail of; None: all is done.
        story: the cases that are done.
    """

    def __init__(self, service: Daemon, waiting: list[Case], progress: Progress) -> None:
        self.case: Case | None = None
        self.story: list[str] = []
        self._service = service
        self._waiting = waiting
        self._progress = progress
        self._jobs = 0

    def next(self) -> None:
        """Start the service with the next failure before it."""
        if self.case is not None:
            self.story.append(str(self.case))
            self._progress(f"{self.case}: {len(self._waiting)} to go")
        self.case = self._waiting.pop(0) if self._waiting else None
        self._jobs = 0
        if self._service.alive:
            self._service.kill()
        self._service.start({VARIABLE: str(self.case or "")})

    def attend(self, job: Job) -> None:
        """See a job through to its end."""
        for word in ("joined", "reached"):
            self._expect(job, word)
        for rank in job.team:
            rank.go_on(0)
        self._expect(job, "left")
        self._jobs += 1
        if self.case is not None and self.case.action in _UNSEEN:
            self.next()
        elif self.case is not None and self._jobs >= _MOST_JOBS:
            raise AssertionError(f"{self.case}: the service did not fail there in {self._jobs} jobs")

    def owner(self, job: Job) -> dict[str, Owned]:
        """What the service holds of a job; it may fail of the question, too."""
        with futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(owner, self._service.address, job.name)
            job.until(lambda: self._helped_up() and asked.done(), "the service tells what it holds")
            return asked.result()

    def _expect(self, job: Job, word: str) -> None:
        job.until(lambda: self._helped_up() and all(rank.has_output for rank in job.team), f"every rank has {word}")
        job.expect(word)

    def _helped_up(self) -> bool:
        if not self._service.alive:
            self.next()
        elif self._service.stopped:
            time.sleep(_STOPPED_S)
            self._service.signal(signal.SIGCONT)
            self.next()
        return True
