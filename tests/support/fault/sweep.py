"""Every named failpoint of the daemon, with everything that can happen there: the job goes on, bit for bit.

Each case is a job of its own, in a service that is told by the environment where it fails. Who killed itself is started
again, and who stopped itself is woken up.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bnserver.failpoints import POINTS, VARIABLE

from support.fault.daemons import Daemon
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.ranks import ranks
from support.fault.report import Report

WORLD = 3
_STEPS = 6  # some 75 exchanges
_STOPPED_S = 0.3

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
    """Let the service fail at every point, so many times each, with every action or those named."""
    report = Report(f"failpoints, seed {seed}")
    chosen = [case for case in cases(seed, hits) if not actions or case.action in actions]
    reached = 0
    with ranks(WORLD, folder / "ranks") as team:
        for number, case in enumerate(chosen):
            service = Daemon(folder / "service")
            try:
                service.start({VARIABLE: str(case)})
                job = Job(f"case-{number}", team, [service.address], folder, seed=seed, until=_STEPS)
                failed = _Tended(service, job)
                for word in ("joined", "reached"):
                    failed.hear(word)
                for rank in team:
                    rank.go_on(0)
                failed.hear("left")
                reached += failed.seen
                if case.action in ("kill", "stop"):
                    report.same(f"{case}: whether the service failed there", failed.seen, True)
                if not service.alive:
                    service.start()
                report.add([f"{case}: {line}" for line in check(job.histories(), owner(service.address, job.name))])
                progress(f"{case}: {'failed there' if failed.seen else 'was not reached'}")
            except AssertionError as error:
                report.add([f"{case}: {error}", service.said()])
                break
            finally:
                if service.alive:
                    service.signal(signal.SIGCONT)
                    service.kill()
    report.done = f"{len(chosen)} cases at {len(POINTS)} points, {reached} killed or stopped the service"
    return report


class _Tended:
    """A service that is helped up whenever it fails.

    Attributes:
        seen: whether it did.
    """

    def __init__(self, service: Daemon, job: Job) -> None:
        self._service = service
        self._job = job
        self.seen = False

    def hear(self, word: str) -> None:
        """The next answer of every rank."""
        self._job.until(self._all_spoke, f"every rank has {word}")
        self._job.hear(word)

    def _all_spoke(self) -> bool:
        if not self._service.alive:
            self.seen = True
            self._service.start()
        elif self._service.stopped:
            self.seen = True
            time.sleep(_STOPPED_S)
            self._service.signal(signal.SIGCONT)
        return all(rank.spoke for rank in self._job.team)
