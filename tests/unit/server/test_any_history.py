"""Whatever the ranks do, in whatever order: the laws of a job hold.

Hypothesis plays four ranks that join, speak, repeat themselves, say something else, leave, lose their connection, come
back in time or too late, freeze and are killed, set their layer's statistics by hand, while time passes and the service
is killed and started again. A model that only counts says what must be true.
"""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bnlayer.agreement import Peer
from bnlayer.collective import Call, ExchangeKey, Operation, PlainSignature
from bnlayer.moving import Rule
from bnserver.core.effects import Closed, Effect, Enrolled, Failed, Joined, Record, Released, Totals
from bnserver.core.events import ConnectionEnded, Contribute, Event, Heartbeat, Join, Leave, Resume, Tick
from bnserver.core.journal_records import JournalRecord
from bnserver.core.members import LivenessTimeouts
from bnserver.core.reasons import Reason
from bnserver.core.service import Service
from support.history import SIGNATURE, Process, bits, next_of, truth

_WORLD = 4
_TIMEOUT_S = 5.0
_TIMEOUTS = LivenessTimeouts(lease=1.0, away=0.5)
_RANKS = st.integers(0, _WORLD - 1)
_ORDERS = st.permutations(range(_WORLD))


class AnyHistory(RuleBasedStateMachine):
    """The service, and what its ranks were told."""

    def __init__(self) -> None:
        super().__init__()
        self.service = Service(timeouts=_TIMEOUTS)
        self.numbers = itertools.count(1)
        self.now = 0.0
        self.ranks: dict[int, Process] = {}
        self.written: list[JournalRecord] = []
        self.returning: set[int] = set()
        self.ending = False
        self.answers: dict[tuple[int, int], bytes] = {}

    # ---- what the ranks do ----

    @initialize()
    def everybody_joins(self) -> None:
        """Most histories begin well."""
        for rank in range(_WORLD):
            self.joins(rank)

    @rule(rank=_RANKS)
    def joins(self, rank: int) -> None:
        """A new process takes a rank's place, or is refused because another one has it."""
        connection = next(self.numbers)
        taken = rank in self.ranks and self.ranks[rank].connection is not None
        if self.ending or (rank in self.ranks and not taken):
            return  # told in the scenarios; here one generation at a time, and no twins
        join = Join(
            connection, "j", Peer(rank, f"h{rank}", connection), _WORLD, _TIMEOUT_S, _TIMEOUT_S, 1000 + connection
        )
        if taken:
            effects = self.service.handle(join, self.now)
            assert [effect.reason for effect in effects if isinstance(effect, Failed)] == [Reason.MISMATCH]
            return
        self.ranks[rank] = Process(rank, 1000 + connection, connection)
        self.does(join)

    @rule(order=_ORDERS)
    def all_speak(self, order: list[int]) -> None:
        """The ranks join if they have to, and all take part in what comes next, in any order."""
        for rank in order:
            if rank not in self.ranks:
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
        """A rank takes part in what comes next; if it has no connection, it will once it is back."""
        process = self.ranks.get(rank)
        if process is not None and process.generation and process.asked is None and process.alive:
            self.asks(process, *next_of(process))

    @rule(rank=_RANKS)
    def repeats_itself(self, rank: int) -> None:
        """What waits is said once more: nothing happens, or the rank gets the answer again."""
        process = self.ranks.get(rank)
        if process is not None and process.connection is not None and process.asked is not None:
            sequence, call, body = process.asked
            self.does(Contribute(process.connection, process.generation, sequence, call, body))  # type: ignore[arg-type]  # a body is what was said

    @rule(rank=_RANKS)
    def says_something_else(self, rank: int) -> None:
        """A rank is at another place than the others."""
        process = self.ranks.get(rank)
        if process is not None and process.generation and process.asked is None:
            self.asks(process, Call(Operation.BARRIER, ExchangeKey(None, None, 99), PlainSignature()), None)

    @rule(rank=_RANKS, reason=st.sampled_from(("", "failed with ValueError: x")))
    def leaves(self, rank: int, reason: str) -> None:
        """A rank says goodbye, and is let go."""
        process = self.ranks.get(rank)
        if process is None or process.connection is None:
            return
        del self.ranks[rank]
        self.returning.discard(rank)
        effects = self.does(Leave(process.connection, reason))
        assert Closed(process.connection, "j") in effects
        self.ending = bool(self.ranks)

    # ---- what happens to them ----

    @rule(rank=_RANKS)
    def is_killed(self, rank: int) -> None:
        """Everybody who is here is told within the second; unless others have yet to come back to a new service."""
        process = self.ranks.pop(rank, None)
        if process is None:
            return
        if process.connection is not None:
            self.does(ConnectionEnded(process.connection))
        if self.returning or self.ending:
            self.ending = bool(self.ranks)  # it has a lease to come back, like those that still will
            return
        self.advance(0.6)
        here = [each for each in self.ranks.values() if each.connection is not None and each.hears]
        # A process that missed the end of its generation is none of those that join the next one.
        assert not any(each.generation == process.generation for each in here)

    @rule(rank=_RANKS)
    def is_cut_off(self, rank: int) -> None:
        """A connection breaks, and the service notices."""
        process = self.ranks.get(rank)
        if process is not None and process.connection is not None:
            connection, process.connection = process.connection, None
            self.does(ConnectionEnded(connection))

    @rule(rank=_RANKS)
    def grows_deaf(self, rank: int) -> None:
        """A connection breaks, and the service does not notice."""
        if rank in self.ranks:
            self.ranks[rank].hears = False

    @rule(rank=_RANKS)
    def freezes(self, rank: int) -> None:
        """No sign of life any more: everybody else is told within the lease."""
        process = self.ranks.get(rank)
        if process is None or process.connection is None or not process.generation or self.returning or self.ending:
            return
        process.alive = False
        self.advance(1.2)
        assert not any(each.connection is not None and each.hears for each in self.ranks.values())

    @rule(rank=_RANKS)
    def comes_back(self, rank: int) -> None:
        """A rank makes a new connection, and says again what may not have been heard."""
        process = self.ranks.get(rank)
        if process is None or (process.connection is not None and process.hears) or not process.alive:
            return
        process.connection, process.hears = next(self.numbers), True
        self.returning.discard(rank)
        resume = Resume(process.generation, process.answered, process.layer_answered) if process.generation else None
        peer = Peer(rank, f"h{rank}", process.incarnation - 1000)
        incarnation = process.incarnation
        self.does(Join(process.connection, "j", peer, _WORLD, _TIMEOUT_S, _TIMEOUT_S, incarnation, resume))
        for reported in (process.before, process.asked):
            if reported is not None and process.connection is not None:
                sequence, call, body = reported
                self.does(Contribute(process.connection, process.generation, sequence, call, body))  # type: ignore[arg-type]  # a body is what was said

    @rule(orders=_ORDERS)
    def all_come_back(self, orders: list[int]) -> None:
        """Whoever is away and lives."""
        for rank in orders:
            self.comes_back(rank)

    @rule(shortened=st.booleans())
    def the_service_is_killed(self, shortened: bool) -> None:
        """And started again from its journal, or from a snapshot: it owns what it owned."""
        if "j" not in self.service.jobs:
            return
        records = self.service.records("j") if shortened else self.written
        before = {name: bits(state) for name, state in self.service.states("j").items()}
        self.service = Service({"j": records}, _TIMEOUTS, self.now)
        assert {name: bits(state) for name, state in self.service.states("j").items()} == before
        for process in self.ranks.values():
            process.connection = None
            if not process.generation:
                process.hears = True
        self.returning = {rank for rank, process in self.ranks.items() if process.generation}
        self.ranks = {rank: each for rank, each in self.ranks.items() if each.generation}

    @rule()
    def a_job_that_is_over_is_forgotten(self) -> None:
        """And read back from its snapshot for whoever joins it, or comes too late: nobody can see the difference."""
        if not self.service.is_over("j"):
            return
        records = self.service.records("j")
        before = {name: bits(state) for name, state in self.service.states("j").items()}
        self.service.forget("j")
        assert self.service.jobs == ()
        self.service.recall("j", records, self.now)
        assert self.service.is_over("j")
        assert {name: bits(state) for name, state in self.service.states("j").items()} == before

    @rule(seconds=st.sampled_from((0.1, 0.6, 6.0)))
    def advance_time(self, seconds: float) -> None:
        """Nobody waits longer than it wants to."""
        self.advance(seconds)
        for process in self.ranks.values():
            if process.asked is not None and process.connection is not None and process.hears:
                assert self.now < process.since + _TIMEOUT_S + 0.2

    # ---- what must be true ----

    @invariant()
    def nobody_waits_for_what_can_not_come(self) -> None:
        """Ranks that all are here and have spoken are answered, or told."""
        here = [p for p in self.ranks.values() if p.generation and p.connection is not None and p.hears and p.alive]
        if len(here) == _WORLD:
            assert not all(process.asked is not None for process in here), "everybody waits, and nobody is told"

    @invariant()
    def the_owner_counts_every_exchange_once(self) -> None:
        """Its bits are those of one rank with all rows, after as many exchanges as its version says."""
        if "j" not in self.service.jobs:
            return
        state = self.service.states("j").get("a")
        if state is not None:
            assert bits(state) == truth(state.version)

    def teardown(self) -> None:
        """Whatever happened: once everybody is back or lost, nobody waits."""
        for rank in tuple(self.ranks):
            self.comes_back(rank)
        self.advance(_TIMEOUT_S + 1.0)
        assert all(process.asked is None for process in self.ranks.values())

    # ---- the model ----

    def asks(self, process: Process, call: Call, body: object) -> None:
        """A rank contributes, if it has a connection."""
        process.asked, process.since = (process.answered + 1, call, body), self.now
        if process.connection is not None:
            self.does(Contribute(process.connection, process.generation, process.answered + 1, call, body))  # type: ignore[arg-type]  # a body is what was said

    def advance(self, seconds: float) -> None:
        """Time passes, and whoever lives says so."""
        end = self.now + seconds
        while self.now < end - 1e-6:
            self.now += 0.1
            for process in self.ranks.values():
                if process.connection is not None and process.alive:
                    self.service.handle(Heartbeat("j", process.rank, process.incarnation), self.now)
            self.does(Tick())

    def does(self, event: Event) -> list[Effect]:
        """Let the service handle it, and the ranks hear of it."""
        effects = self.service.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, Record):
                self.written.append(effect.record)
                continue
            connections = getattr(effect, "connections", None) or (getattr(effect, "connection", None),)
            for process in tuple(self.ranks.values()):
                if process.connection is not None and process.connection in connections:
                    self.hears(process, effect)
        if not self.ranks:
            self.ending = False
            self.returning = set()
        return effects

    def hears(self, process: Process, effect: Effect) -> None:
        """What a rank makes of what it is told."""
        if isinstance(effect, Failed):
            assert "hold another state of the layer than its owner" not in effect.text
            # Where it does not hear it, it finds nothing to come back to.
            process.connection = None
            if process.hears or not process.alive:
                del self.ranks[process.rank]
            self.returning.discard(process.rank)
            return
        if not process.hears:
            return
        if isinstance(effect, Joined):
            if process.generation == 0:
                process.generation = effect.generation
            assert process.generation == effect.generation
            return
        if not isinstance(effect, Totals | Enrolled | Released) or effect.sequence <= process.answered:
            return
        said_before = process.asked
        assert said_before is not None
        assert said_before[0] == effect.sequence == process.answered + 1
        process.answered, process.before, process.asked = effect.sequence, said_before, None
        if said_before[1].key.layer is not None:
            process.layer_answered = effect.sequence
        reported = effect.limbs.tobytes() if isinstance(effect, Totals) else type(effect).__name__.encode()
        assert self.answers.setdefault((process.generation, effect.sequence), reported) == reported
        if isinstance(effect, Enrolled):
            process.state = effect.state
        elif isinstance(effect, Totals):
            self.accept(process, effect)

    def accept(self, process: Process, totals: Totals) -> None:
        """A rank walks through the exchange as the owner does."""
        assert process.exchange is not None
        assert process.state is not None
        exchange = process.exchange.reduced(totals.limbs)
        process.exchange = exchange
        if exchange.statistics is not None:
            rule = Rule(SIGNATURE.momentum, SIGNATURE.epsilon)
            process.state = process.state.after_forward(exchange.statistics, exchange.grid, rule)
            process.steps, process.exchange = process.steps + 1, None
            assert bits(process.state) == truth(totals.version)
        assert totals.version == process.state.version


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30)
