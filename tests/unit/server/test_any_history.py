"""Whatever the ranks do, in whatever order: the laws of a job hold.

Hypothesis plays four ranks that join, speak, repeat themselves, say something else, push, leave, crash and come back
late, while time passes. A model that only counts says what must be true.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, LayerTerms, Operation, Place, PlainTerms
from bnlayer.exchange import ForwardExchange
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.moving import Moving, Rule
from bnlayer.state import LayerState
from bnserver.core.effects import Closed, Effect, Enrolled, Failed, Joined, Reason, Released, Totals
from bnserver.core.events import Contribute, Event, Join, Leave, Lost, Tick
from bnserver.core.service import Service

_WORLD = 4
_TERMS = LayerTerms(1, "float32", 0.9, 0.001)
_X = [np.full((rows, 1, 1), value, np.float32) for rows, value in ((1, 0.5), (2, -3.0), (0, 0.0), (3, 7.25))]
_RANKS = st.integers(0, _WORLD - 1)
_ORDERS = st.permutations(range(_WORLD))


class AnyHistory(RuleBasedStateMachine):
    """The service, and what its ranks were told."""

    def __init__(self) -> None:
        super().__init__()
        self.service = Service()
        self.streams = itertools.count(1)
        self.now = 0.0
        self.seat: dict[int, int] = {}
        self.running = False
        self.generation = 0
        self.completed = 0
        self.waiting: dict[int, tuple[Call, object]] = {}
        self.waiting_since: dict[int, float] = {}
        self.updates = 0
        self.exchange: ForwardExchange | None = None
        self.state: LayerState | None = None

    # ---- what the ranks do ----

    @initialize()
    def everybody_joins(self) -> None:
        """Most histories begin well."""
        for rank in range(_WORLD):
            self.joins(rank)

    @rule(rank=_RANKS)
    def joins(self, rank: int) -> None:
        """A new process takes a rank's place, or is refused because another one has it."""
        stream = next(self.streams)
        taken, ending = rank in self.seat, self.running and len(self.seat) < _WORLD
        if ending:
            return  # told in the scenarios; here one generation at a time
        effects = self.does(Join(stream, "j", Peer(rank, f"h{rank}", stream), _WORLD, 50.0, 50.0), stream)
        if taken:
            assert [effect.reason for effect in effects if isinstance(effect, Failed)] == [Reason.MISMATCH]
        elif not any(isinstance(effect, Failed) for effect in effects):
            self.seat[rank] = stream
            self.hears(effects)

    @rule(order=_ORDERS)
    def all_speak(self, order: list[int]) -> None:
        """The ranks join if they have to, and all take part in what comes next, in any order."""
        if not self.running:
            for rank in order:
                self.joins(rank)
        for rank in order:
            self.speaks(rank)

    @rule(orders=st.lists(_ORDERS, min_size=2, max_size=4))
    def all_train(self, orders: list[list[int]]) -> None:
        """Nothing goes wrong for a while."""
        for order in orders:
            self.all_speak(order)

    @rule(rank=_RANKS)
    def speaks(self, rank: int) -> None:
        """A rank takes part in what comes next."""
        if self.running and rank in self.seat and rank not in self.waiting:
            self.says(rank, *self.next_call(rank))

    @precondition(lambda self: self.running)
    @rule(rank=_RANKS, shift=st.sampled_from((0, 0, 0, 1)))
    def repeats_itself(self, rank: int, shift: int) -> None:
        """What is said once more, with the number that waits, or with one that was answered long ago."""
        if rank not in self.waiting:
            return
        call, body = self.waiting[rank]
        number = self.completed + 1 - shift
        effects = self.does(Contribute(self.seat[rank], self.generation, number, call, body), self.seat[rank])  # type: ignore[arg-type]  # a body is what was said
        if shift == 0:
            assert effects == []
        else:
            self.hears(effects)
            assert rank not in self.seat

    @precondition(lambda self: self.running)
    @rule(rank=_RANKS)
    def says_something_else(self, rank: int) -> None:
        """A rank is at another place than the others."""
        if rank in self.seat and rank not in self.waiting:
            self.says(rank, Call(Operation.BARRIER, Place(None, None, 99), PlainTerms()), None)

    @rule(rank=_RANKS, reason=st.sampled_from(("", "failed with ValueError: x")))
    def leaves(self, rank: int, reason: str) -> None:
        """A rank says goodbye, and is let go."""
        if rank not in self.seat:
            return
        stream = self.seat[rank]
        effects = self.does(Leave(stream, reason), stream)
        assert Closed(stream) in effects
        self.gone(rank)
        self.hears(effects)

    @rule(rank=_RANKS)
    def crashes(self, rank: int) -> None:
        """A connection breaks: everybody else is told, after the grace at the latest."""
        if rank not in self.seat:
            return
        stream = self.seat[rank]
        self.gone(rank)
        effects = self.does(Lost(stream), stream)
        self.now += 0.4
        effects += self.does(Tick(), None)
        told = {effect.stream for effect in effects if isinstance(effect, Failed)}
        assert told == set(self.seat.values())
        self.hears(effects)
        assert not self.seat

    @rule(seconds=st.sampled_from((0.1, 0.6, 60.0)))
    def time_passes(self, seconds: float) -> None:
        """Nobody waits longer than it wants to."""
        self.now += seconds
        self.hears(self.does(Tick(), None))
        assert all(self.now < since + 50.0 for since in self.waiting_since.values())

    # ---- what must be true ----

    @invariant()
    def nobody_waits_for_what_can_not_come(self) -> None:
        """Ranks that all have spoken are answered; so are ranks that wait for one that has left, after the grace."""
        if not self.running or not self.waiting:
            return
        assert set(self.waiting) != set(self.seat), "everybody waits, and nobody is told"

    @invariant()
    def the_owner_counts_every_exchange_once(self) -> None:
        """One update per completed forward exchange, and the bits of one rank with all rows."""
        if "j" not in self.service.jobs:
            return
        state = self.service.snapshot("j").states.get("a")
        if state is None:
            assert self.updates == 0
            return
        assert state.version == self.updates
        assert self.state is not None
        assert state.moving.mean.tobytes() == self.state.moving.mean.tobytes()
        assert state.moving.variance.tobytes() == self.state.moving.variance.tobytes()

    # ---- the model ----

    def next_call(self, rank: int) -> tuple[Call, object]:
        """What a well-behaved rank says now."""
        if self.state is None or self.completed == 0:
            fresh = Moving(np.zeros(1, np.float32), np.ones(1, np.float32))
            grids = Grid.unknown("float32", 1), BackwardGrid.unknown("float32", 1)
            return Call(Operation.ENROLL, Place("a", None, 0), _TERMS), LayerState(fresh, *grids)
        if self.exchange is None:
            self.exchange = ForwardExchange.begin(self.state.forward, _TERMS.epsilon, False)
        exchange = self.exchange
        assert exchange.wants is not None
        if exchange.wants is Operation.PROBE:
            words = reference.probe(_X[rank], None, exchange.grid)
        else:
            words = reference.moments(_X[rank], None, exchange.grid).words
        terms = LayerTerms(1, "float32", 0.9, 0.001, grid=exchange.fingerprint)
        place = Place("a", Direction.FORWARD, self.updates)
        return Call(exchange.wants, place, terms, exchange.attempt), words

    def says(self, rank: int, call: Call, body: object) -> None:
        """Send a contribution, and take note of it."""
        self.waiting[rank] = (call, body)
        self.waiting_since[rank] = self.now
        stream = self.seat[rank]
        contribution = Contribute(stream, self.generation, self.completed + 1, call, body)  # type: ignore[arg-type]  # a body is what was said
        self.hears(self.does(contribution, stream))

    def does(self, event: Event, stream: int | None) -> list[Effect]:
        """Let the service handle it."""
        return self.service.handle(event, self.now)

    def hears(self, effects: list[Effect]) -> None:
        """Update the model by what the ranks are told."""
        for effect in effects:
            match effect:
                case Joined():
                    assert effect.streams == tuple(self.seat[rank] for rank in range(_WORLD))
                    assert effect.generation > self.generation
                    self.generation, self.completed, self.running = effect.generation, 0, True
                    self.exchange = None
                case Failed():
                    self.gone(next(rank for rank, stream in self.seat.items() if stream == effect.stream))
                case Enrolled():
                    self.answered()
                    self.state = effect.state
                case Totals():
                    self.answered()
                    self.accept(effect)
                case Released():
                    self.answered()
                case _:
                    pass
        if not self.seat:
            self.running = False

    def accept(self, totals: Totals) -> None:
        """A rank walks through the exchange as the owner does."""
        assert self.exchange is not None
        assert self.state is not None
        self.exchange = self.exchange.reduced(totals.words)
        if self.exchange.statistics is not None:
            self.state = self.state.after_forward(
                self.exchange.statistics, self.exchange.grid, Rule(_TERMS.momentum, _TERMS.epsilon)
            )
            self.updates += 1
            self.exchange = None
        assert totals.version == self.updates

    def answered(self) -> None:
        """The operation is complete: everybody was there."""
        assert set(self.waiting) == set(range(_WORLD))
        self.waiting.clear()
        self.waiting_since.clear()
        self.completed += 1

    def gone(self, rank: int) -> None:
        """A rank has lost its seat."""
        self.seat.pop(rank, None)
        self.waiting.pop(rank, None)
        self.waiting_since.pop(rank, None)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
