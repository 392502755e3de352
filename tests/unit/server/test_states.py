"""The tables of the service's core: every row can happen, and nothing else does."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnserver.core import gathering, generation, members
from bnserver.core.events import ConnectionEnded, Event, Join, Leave, Resume, Tick
from bnserver.core.gathering import GRACE_S, STATES, Gathering, State
from bnserver.core.generation import PHASES
from bnserver.core.members import PRESENCES
from bnserver.core.service import Service

_CALLS = {
    name: Call(Operation.SUMS, ExchangeKey(name, Direction.FORWARD, 0), LayerSignature(1, "float32", 0.9, 0.001))
    for name in ("same", "other")
}
_RANKS = range(3)
_TIMEOUT_S = 9.0


class _Recorded(dict[Any, Any]):
    """A table that knows which of its rows were used."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__(table)
        self.used: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.used.add(key)
        return super().__getitem__(key)


class _Operation:
    """An operation of three ranks, after some moves: a rank calls, leaves or fails, or time passes."""

    def __init__(self, moves: tuple[tuple[str, int], ...]) -> None:
        self.it = Gathering(len(_RANKS))
        self.now = 0.0
        self.called: dict[int, str] = {}
        self.departed: set[int] = set()
        for what, who in moves:
            self._move(what, who)

    def _move(self, what: str, who: int) -> None:
        if what in _CALLS:
            self.called[who] = what
            self.it.add(who, _CALLS[what], np.full((6, 1), 2**who), self.now, self.now + _TIMEOUT_S)
        elif what == "time":
            self.now += (GRACE_S / 4, GRACE_S, _TIMEOUT_S)[who]
            self.it.wait(self.now)
        else:
            self.departed.add(who)
            self.it.depart(who, self.now - GRACE_S / 2, self.now, failed=what == "fails")

    def moves(self) -> Iterator[tuple[str, int]]:
        """What may happen next."""
        here = [rank for rank in _RANKS if rank not in self.departed]
        if self.it.state is State.COMPLETE:
            return
        yield from (("fails", rank) for rank in here)
        if self.it.state is State.ABORTED:
            return
        yield from (("leaves", rank) for rank in here)
        yield from ((call, rank) for rank in here if rank not in self.called for call in _CALLS)
        yield from (("time", length) for length in range(3))

    @property
    def key(self) -> object:
        """What the rest of its life depends on."""
        doomed = self.it._doomed_since
        age = None if doomed is None else round(self.now - doomed, 2)
        waits = [round(deadline - self.now, 2) for deadline in self.it._deadlines.values()]
        return (
            self.it.state,
            tuple(self.called.items()),
            frozenset(self.departed),
            self.it._has_failed,
            age,
            tuple(waits),
        )

    def check(self) -> None:
        """What must be true of it."""
        alike = set(self.called.values()) == {"same"}
        if self.it.state is State.COMPLETE:
            assert alike or set(self.called.values()) == {"other"}
            assert (set(self.called), self.departed) == (set(_RANKS), set())
            assert self.it.limbs is not None
            assert self.it.limbs.tolist() == [[7]] * 6
        elif self.it.state in (State.DOOMED, State.ABORTED):
            assert self.departed or self.it.is_overdue or len(set(self.called.values())) == 2
        elif self.it.state is State.GATHERING:
            assert self.it.calls
            assert not self.departed
        else:
            assert not self.it.calls
            assert (self.it.state is State.DEPARTED) is bool(self.departed)


def test_an_operation_is_always_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that three ranks can do, in every order: no move lacks a row, and no row is never used."""
    table = _Recorded(STATES)
    monkeypatch.setattr(gathering, "STATES", table)
    seen: set[object] = set()
    queue: list[tuple[tuple[str, int], ...]] = [()]
    while queue:
        moves = queue.pop()
        operation = _Operation(moves)
        if operation.key in seen or len(moves) > 6:
            continue
        seen.add(operation.key)
        operation.check()
        queue += [(*moves, move) for move in operation.moves()]
    assert table.used == set(STATES)


def _join(connection: int, rank: int, *, resume: bool = False) -> Join:
    resumption = Resume(1, 0, 0) if resume else None
    return Join(connection, "j", Peer(rank, "h", rank), 2, _TIMEOUT_S, _TIMEOUT_S, 1000 + rank, resumption)


def _played(events: list[Event | float | None]) -> None:
    """Events, one after the other; a number is a tick at that time, None a restart of the service."""
    service, now = Service(), 0.0
    for event in events:
        if event is None:
            service = Service({"j": service.records("j")}, now=now)
        elif isinstance(event, float):
            now = event
            service.handle(Tick(), now)
        else:
            service.handle(event, now)


def test_ranks_and_generations_are_always_in_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining, running and recovering, each to its end; connections that break, and are made anew or not."""
    phases, presences = _Recorded(PHASES), _Recorded(PRESENCES)
    monkeypatch.setattr(generation, "PHASES", phases)
    monkeypatch.setattr(members, "PRESENCES", presences)
    both: list[Event | float | None] = [_join(1, 0), _join(2, 1)]
    back: list[Event | float | None] = [_join(3, 0, resume=True), _join(4, 1, resume=True)]
    _played([_join(1, 0), Leave(1, "")])
    _played([*both, ConnectionEnded(1), *back, Leave(3, ""), Leave(4, "")])
    _played([*both, ConnectionEnded(1), 1.0, 2.0])
    _played([*both, None, *back, Leave(3, ""), Leave(4, "")])
    _played([*both, None, _join(3, 0, resume=True), ConnectionEnded(3), 6.0, 7.0])
    assert phases.used == set(PHASES)
    assert presences.used == set(PRESENCES)
