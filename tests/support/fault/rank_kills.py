"""kill -9 or SIGSTOP of a rank: every survivor's error names it, in time, wherever the two are at that moment.

A round is a job of its own. In "parked" the victim waits in an exchange, for a rank that computes; in "computing" all
wait for the victim; in "running" nobody pauses, and the signal comes when it comes.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.fault.daemons import daemon
from support.fault.history import Record
from support.fault.jobs import Job
from support.fault.ranks import Rank, end, ranks
from support.fault.report import Report, Times

WORLD = 3
DEFAULT_LEASE_S = 5.0
KILLED_S = 1.0  # the promise, for 99 of 100
STOPPED_S = 1.0  # the promise: so long after the lease, at most
_STATES = ("parked", "computing", "running")
_MOST_EXCHANGES = 60
_STEPS = 24  # some 260 exchanges: no job is over before the signal, however late it comes
_LONGEST_DELAY_S = 0.01

Progress = Callable[[str], None]
Position = tuple[str | None, int]


@dataclass(frozen=True)
class Turn:
    """What one round does: a pure function of the seed.

    Attributes:
        number: the round's.
        victim: a rank.
        late: the rank that computes while the others are parked; not the victim.
        state: what the victim does.
        exchange: how many exchanges come before.
        delay: seconds between the last thing seen and the signal.
    """

    number: int
    victim: int
    late: int
    state: str
    exchange: int
    delay: float

    @classmethod
    def draw(cls, seed: int, number: int) -> Turn:
        """The round of this number; the states take turns."""
        rng = np.random.default_rng([seed, number])
        victim = int(rng.integers(WORLD))
        late = (victim + 1 + int(rng.integers(WORLD - 1))) % WORLD
        exchange, delay = int(rng.integers(_MOST_EXCHANGES)), float(rng.uniform(0, _LONGEST_DELAY_S))
        return cls(number, victim, late, _STATES[number % len(_STATES)], exchange, delay)

    def __str__(self) -> str:
        return f"round {self.number}: rank {self.victim} {self.state} at exchange {self.exchange}"

    @property
    def paused(self) -> int | None:
        """The rank that pauses, busily."""
        return {"parked": self.late, "computing": self.victim, "running": None}[self.state]


def rank_kills(
    folder: Path, seed: int, turns: int, number: signal.Signals, lease: float | None, progress: Progress
) -> Report:
    """Send a signal to one rank of three, again and again.

    Args:
        folder: of state, histories and logs.
        seed: of victims and moments.
        turns: how often.
        number: SIGKILL or SIGSTOP.
        lease: the service's; None: what it has by itself.
        progress: is told each round.
    """
    name = "kill -9" if number is signal.SIGKILL else "SIGSTOP"
    report = Report(f"{name} of a rank, seed {seed}")
    if number is signal.SIGKILL:
        failures = Times("a survivor was told", KILLED_S, share=0.99)
    else:
        failures = Times("a survivor was told", (DEFAULT_LEASE_S if lease is None else lease) + STOPPED_S)
    report.times.append(failures)
    options = () if lease is None else (f"--lease={lease:g}",)
    with daemon(folder / "service", *options) as service, ranks(WORLD, folder / "ranks") as team:
        campaign = _Campaign(service.address, team, folder, seed, report)
        for turn in (Turn.draw(seed, count) for count in range(turns)):
            try:
                failures.seconds += campaign.play(turn, number)
                progress(str(turn))
            except AssertionError as error:
                report.add([f"{turn}: {error}", service.output()])
                break
    report.done = f"{len(failures.seconds) // (WORLD - 1)} of {turns} rounds, {len(failures.seconds)} survivors told"
    return report


class _Campaign:
    """What the rounds share: the service, the workers, and where a rank is in each of its exchanges."""

    def __init__(self, address: str, team: list[Rank], folder: Path, seed: int, report: Report) -> None:
        self._address = address
        self._team = team
        self._folder = folder
        self._seed = seed
        self._report = report
        job = self._job("places")
        job.expect("joined")
        job.expect("reached")
        job.leave()
        self._positions = _positions_of(job.histories()[0])

    def play(self, turn: Turn, number: signal.Signals) -> list[float]:
        """Play a round; returns after how many seconds each survivor was told."""
        job = self._job(f"round-{turn.number}", turn)
        job.expect("joined")
        if turn.paused is not None:
            self._team[turn.paused].expect("paused")
        job.await_progress([turn.exchange] * WORLD)
        time.sleep(turn.delay)  # no matter where this hits it: that is what is tested
        victim = self._team[turn.victim]
        began = victim.signal(number)
        if turn.state == "parked":
            self._team[turn.late].go_on()  # a rank that computes is told at its next call
        survivors = [rank for rank in range(WORLD) if rank != turn.victim]
        failures = {rank: self._team[rank].expect("told") for rank in survivors}
        for rank, answer in failures.items():
            self._check(turn, f"{turn}: rank {rank}", victim.pid, answer)
        self._wake(turn, number)
        for path in job.paths:
            path.unlink()
        return [answer["when"] - began for answer in failures.values()]

    def _job(self, name: str, turn: Turn | None = None) -> Job:
        own = {}
        if turn is not None and turn.paused is not None:
            own[turn.paused] = {"pauses": (turn.exchange,), "how": "compute"}
        return Job(name, self._team, [self._address], self._folder, seed=self._seed, until=_STEPS, own=own)

    def _check(self, turn: Turn, who: str, pid: int, answer: dict[str, Any]) -> None:
        """Whether a survivor was told by name: which rank, where it ran, and in which exchange this one was."""
        named = f"rank {turn.victim} (host {socket.gethostname()}, pid {pid})"
        self._report.same(f"{who}: its error", answer["kind"], "PeerLostError")
        self._report.same(f"{who}: whom it blames", answer["ranks"], [turn.victim])
        if named not in answer["text"]:
            self._report.add([f"{who} was not told of {named}: {answer['text']}"])
        # What the victim had put in may complete one more than those that were seen.
        positions = self._positions if turn.state == "running" else self._positions[turn.exchange : turn.exchange + 2]
        if (answer["layer"], answer["step"]) not in positions:
            self._report.add([f"{who} was in {positions}, and was told {answer['layer']}, {answer['step']}"])

    def _wake(self, turn: Turn, number: signal.Signals) -> None:
        """Make the victim ready for another round: a new process, or the old one, once it heard what happened."""
        victim = self._team[turn.victim]
        if number is signal.SIGKILL:
            end([victim])
            victim = self._team[turn.victim] = Rank(self._folder / "ranks" / f"{turn.number}.err")
            victim.expect("ready")
            return
        victim.signal(signal.SIGCONT)
        if turn.state == "computing":
            victim.go_on()
        victim.expect("told")


def _positions_of(history: list[Record]) -> list[Position]:
    positions: list[Position] = []
    plain = 0
    for record in history:
        if record.op in ("allreduce", "broadcast", "barrier"):
            positions.append((None, plain))
            plain += 1
        else:
            positions.append((record.layer, record.step))
    return positions
