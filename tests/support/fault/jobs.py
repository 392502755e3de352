"""A job of a campaign: workers that train the same model together, and what is seen of them from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.fault.history import Record, read, statistics
from support.fault.model import Owned
from support.fault.program import LAYERS
from support.fault.ranks import LIMIT_S, Rank
from support.fault.worker import Part

_LOOK_S = 0.001


class JobError(AssertionError):
    """A rank said something else than it had to; the text says what."""


class Job:
    """One job's ranks.

    Args:
        name: the job's.
        team: its workers, in rank order.
        addresses: where each of them finds the service; one: all the same.
        folder: of the histories.
        seed: of the data.
        until: the step at which they stop.
        options: of every rank's `Part`.
        own: further ones of single ranks.
    """

    def __init__(
        self,
        name: str,
        team: Sequence[Rank],
        addresses: Sequence[str],
        folder: Path,
        *,
        seed: int,
        until: int,
        options: Mapping[str, Any] | None = None,
        own: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.name = name
        self.team = team
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{name}-{rank}.jsonl" for rank in range(len(team))]
        self._counted = [(0, 0)] * len(team)
        for rank, worker in enumerate(team):
            address = addresses[rank % len(addresses)]
            more = {**(options or {}), **(own or {}).get(rank, {})}
            log = str(self.paths[rank])
            worker.play(Part(address, name, rank, len(team), seed, until, log=log, **more))

    def expect(self, *expected: str, within: float = LIMIT_S) -> list[dict[str, Any]]:
        """The next answer of every rank."""
        return [worker.expect(*expected, within=within) for worker in self.team]

    def finish(self) -> None:
        """Return when every rank has reached its last step; as long as the job goes on, it may take its time."""
        counted, deadline = -1, 0.0
        while not all(worker.has_output for worker in self.team):
            now, done = time.monotonic(), sum(map(self.exchanges, range(len(self.team))))
            if done > counted:
                counted, deadline = done, now + LIMIT_S
            if now > deadline:
                raise JobError(f"after {self._done()} exchanges the job stands still")
            time.sleep(_LOOK_S)
        self.expect("reached")

    def leave(self) -> None:
        """Every rank was told to stop where it is; now it leaves."""
        for worker in self.team:
            worker.go_on(0)
        self.expect("left")

    def exchanges(self, rank: int) -> int:
        """How many a rank has completed: the lines of its history."""
        offset, lines = self._counted[rank]
        if self.paths[rank].exists():
            with self.paths[rank].open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset, lines = offset + len(new), lines + new.count(b"\n")
            self._counted[rank] = offset, lines
        return lines

    def await_progress(self, counts: Sequence[int], quiet: Sequence[Rank] = ()) -> None:
        """Return when every rank has completed so many exchanges.

        Args:
            counts: by rank.
            quiet: ranks that must say nothing meanwhile.
        """
        self.until(
            lambda: all(self.exchanges(rank) >= count for rank, count in enumerate(counts)),
            f"{counts} exchanges are done",
            quiet,
        )

    def until(self, holds: Callable[[], bool], what: str, quiet: Sequence[Rank] = ()) -> None:
        """Return when something is so.

        Raises:
            JobError: a rank that must be quiet spoke, or it takes too long.
        """
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            for rank in quiet:
                if rank.has_output:
                    raise JobError(f"while waiting until {what}, pid {rank.pid} said {rank.expect_any()}")
            if time.monotonic() > deadline:
                raise JobError(f"waited {LIMIT_S:g} s until {what}; exchanges so far: {self._done()}")
            time.sleep(_LOOK_S)

    def _done(self) -> list[int]:
        return [self.exchanges(rank) for rank in range(len(self.team))]

    def histories(self) -> list[list[Record]]:
        """What every rank saw."""
        return [read(path) if path.exists() else [] for path in self.paths]


def owner(address: str, job: str, timeout: float = LIMIT_S) -> dict[str, Owned]:
    """What the service holds of every layer of a job that no rank is in."""
    with alone(address, job, timeout) as world:
        states = {name: world.pull(name) for name in LAYERS}
    return {name: (statistics(state), state.version) for name, state in states.items() if state is not None}


@contextmanager
def alone(address: str, job: str, timeout: float = LIMIT_S) -> Iterator[World]:
    """A job's only rank."""
    with World(ServiceTransport(address, job, 0, 1, timeout=timeout), install=False) as world:
        yield world
