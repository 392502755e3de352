"""A full disk under a running job: the job goes on or every rank is told why, and what is on disk is never half of it.

In a "freed" round there is room again after a while. In a "killed" one the service is killed with -9 while the disk is
full; in a "saved" one after there was room again, and the service had said that all is saved: nothing is lost then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.disk import WAYS, Disk, disk
from support.fault.daemons import Daemon
from support.fault.jobs import Job, owner
from support.fault.model import check, timeline
from support.fault.ranks import Rank, ranks
from support.fault.report import Report

WORLD = 3
_STEPS = 24  # some 260 exchanges: no job is over before the disk is full
_STEPS_UNTIL_SAVED = 40  # long enough for the job to go on until all is saved
_WHATS = ("freed", "killed", "saved")
_MOST_EXCHANGES = 60  # before the disk is full
_MOST_BYTES = 3000  # that are left then
_MEANWHILE = 25  # exchanges on a full disk, if the job goes on

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """What one round does: a pure function of the seed.

    Attributes:
        number: the round's.
        way: how the disk is full.
        what: "freed", "killed" or "saved".
        exchanges: how many come before.
        room: bytes that are left.
    """

    number: int
    way: str
    what: str
    exchanges: int
    room: int

    @classmethod
    def draw(cls, seed: int, number: int) -> Turn:
        """The round of this number; ways and kills take turns."""
        rng = np.random.default_rng([seed, number])
        exchanges, room = int(rng.integers(_MOST_EXCHANGES)), int(rng.integers(_MOST_BYTES))
        return cls(number, WAYS[number % 2], _WHATS[number // 2 % 3], exchanges, room)

    def __str__(self) -> str:
        return f"round {self.number}: {self.way}, {self.what}, {self.room} bytes left after {self.exchanges} exchanges"


def full_disk(folder: Path, seed: int, turns: int, progress: Progress) -> Report:
    """Fill the disk under a job, so many times."""
    report = Report(f"a full disk, seed {seed}")
    with ranks(WORLD, folder / "ranks") as team:
        for turn in (Turn.draw(seed, number) for number in range(turns)):
            turn_folder = folder / f"round-{turn.number}"
            turn_folder.mkdir()
            with disk(turn_folder / "disk", turn.way) as tiny:
                service = Daemon(turn_folder, state=tiny.folder / "state")
                try:
                    story = _Trial(turn, service, tiny, team, seed, report).play()
                    report.story.append(f"{turn}: {story}")
                    progress(report.story[-1])
                except AssertionError as error:
                    report.add([f"{turn}: {error}", service.output()])
                    break
                finally:
                    if service.alive:
                        service.kill()
    went_on = sum("went on" in line for line in report.story)
    report.done = f"{len(report.story)} rounds; {went_on} jobs went on, the ranks of the others were told"
    return report


class _Trial:
    """One job on one disk."""

    def __init__(self, turn: Turn, service: Daemon, tiny: Disk, team: list[Rank], seed: int, report: Report) -> None:
        self._turn = turn
        self._service = service
        self._disk = tiny
        self._team = team
        self._report = report
        service.start()
        steps = _STEPS_UNTIL_SAVED if turn.what == "saved" else _STEPS
        self._job = Job(f"job-{turn.number}", team, [service.address], tiny.folder.parent, seed=seed, until=steps)

    def play(self) -> str:
        """Fill the disk, and see what becomes of the job; returns it in words."""
        self._job.expect("joined")
        self._job.await_progress([self._turn.exchanges] * WORLD, quiet=self._team)
        largest = max((path.stat().st_size for path in self._service.state.iterdir()), default=0)
        self._disk.fill(self._service.pid, self._turn.room, largest)
        self._meanwhile()
        if self._disk.error not in self._log():
            self._report.add([f"{self._turn}: the service's log does not say {self._disk.error!r}"])
        if self._turn.what == "killed":
            self._service.kill()
        self._disk.free(self._service.pid if self._service.alive else None)
        if self._turn.what == "saved":
            self._job.until(lambda: "is saved again" in self._log(), "the service says that all is saved")
            self._service.kill()
        if not self._service.alive:
            self._service.start()
        answers = self._job.expect("reached", "told")
        if self._turn.what == "saved" or all(answer["at"] == "reached" for answer in answers):
            return self._went_on(answers)
        return self._outcome(answers)

    def _log(self) -> str:
        return self._service.log.read_text(encoding="utf-8")

    def _meanwhile(self) -> None:
        """Until the job has made some exchanges on the full disk, or its ranks were told."""
        counts = [self._job.exchanges(rank) + _MEANWHILE for rank in range(WORLD)]

        def over() -> bool:
            done = all(self._job.exchanges(rank) >= count for rank, count in enumerate(counts))
            return done or all(rank.has_output for rank in self._team)

        self._job.until(over, "the job goes on or its ranks are told")

    def _went_on(self, answers: list[dict[str, object]]) -> str:
        """Everything is as if nothing had happened, and outlives the service."""
        assert all(answer["at"] == "reached" for answer in answers), answers
        self._job.leave()
        self._service.kill()
        self._service.start()
        wrong = check(self._job.histories(), owner(self._service.address, self._job.name))
        self._report.add([f"{self._turn}: {line}" for line in wrong])
        return "went on"

    def _outcome(self, answers: list[dict[str, object]]) -> str:
        """Every rank hears of it, and what is on disk is a state of before; the job can begin again."""
        for rank, answer in enumerate(answers):
            self._report.same(f"{self._turn}: what rank {rank} was told", answer.get("kind"), "ServiceError")
        if not self._service.alive:
            self._service.start()
        held = owner(self._service.address, self._job.name)
        if held not in timeline(self._job.histories()):
            self._report.add([f"{self._turn}: the service holds what it never held before: {held}"])
        return f"told: {answers[0].get('text')}"
