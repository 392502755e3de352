"""Plays a scenario: commands in a text file, what the service then says to whom, compared as text.

The core of the service is driven directly, with a clock that only `wait` moves. The ranks are small but real: they
compute words with the reference kernels, walk through exchanges as the layer does, and keep a mirror of the owner's
state, which must equal the owner's bit for bit after every exchange.

Whatever the service wants written is kept, and `restart` makes a new service of it: nobody is connected then. Ranks
give signs of life as time passes, but for those that are frozen.

`rank=*` stands for every rank that has joined. Below `in any order:`, commands are played in every order; all must give
the same lines.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from bnlayer.agreement import Peer
from bnlayer.collective import ADMIT, Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.reduction import reduce_in_rank_order
from bnlayer.state import LayerState
from bnproto.failures import error_of
from bnserver.core.effects import (
    Broadcast,
    Closed,
    Effect,
    Enrolled,
    Failed,
    Joined,
    Owned,
    Persist,
    Record,
    Reduce,
    Released,
    Straggling,
    Totals,
)
from bnserver.core.events import (
    Body,
    ConnectionEnded,
    Contribute,
    Elastic,
    Event,
    Heartbeat,
    Join,
    Leave,
    Malformed,
    Pull,
    Push,
    Resume,
    Stop,
    Tick,
)
from bnserver.core.journal_records import JournalRecord
from bnserver.core.service import Service
from bnserver.core.validation import validated
from bnserver.translation import failure_of
from scenarios.actors import Exchange, Mirror, Options, Rank, backward, described, forward, listed, numbers
from scenarios.transcript import Block, orders


def play(blocks: list[Block]) -> list[Block]:
    """The blocks with what really happens; asserts that orders don't matter where the scenario says so."""
    results = []
    for variant in orders(blocks):
        scene = Scene()
        results.append([replace(block, expected=tuple(scene.act(block.commands))) for block in variant])
    reported = {tuple(block.expected for block in result) for result in results}
    assert len(reported) == 1, f"the order is visible: {reported}"
    return [replace(block, expected=got.expected) for block, got in zip(blocks, results[0], strict=True)]


class Scene:
    """The service and its ranks."""

    def __init__(self) -> None:
        self._service = Service()
        self._tenths = 0
        self._connections = count(1)
        self._written: dict[str, list[JournalRecord]] = defaultdict(list)
        self._ranks: dict[str, Rank] = {}
        self._by_connection: dict[int, Rank] = {}
        self._lines: dict[str, list[str]] = defaultdict(list)

    def act(self, commands: tuple[str, ...]) -> list[str]:
        """Carry out commands; returns what was said, rank by rank."""
        for command in commands:
            verb, *arguments = shlex.split(command)
            options = dict(word.split("=", 1) for word in arguments)
            names = list(self._ranks) if options.get("rank") == "*" else [options.get("as", options.get("rank", ""))]
            for name in names:
                getattr(self, f"_do_{verb}")(name, options)
        lines, self._lines = self._lines, defaultdict(list)
        return _grouped(lines)

    # ---- commands ----

    def _do_join(self, name: str, options: Options) -> None:
        connection, number = next(self._connections), int(options["rank"])
        peer = Peer(number, f"n{name}", 100 + connection)
        timeout = float(options.get("timeout", 300))
        world = int(options["world"])
        join = Join(connection, options.get("job", "j"), peer, world, timeout, timeout, incarnation=1000 + connection)
        if "elastic" in options:
            elastic = Elastic(*map(int, options["elastic"].split(":")))
            join = replace(join, elastic=elastic, restarted="restarted" in options)
        rank = Rank(name, number, connection, join)
        self._ranks[name] = self._by_connection[connection] = rank
        self._handle(join)

    def _do_rejoin(self, name: str, options: Options) -> None:
        """A rank of an elastic job that was told to regroup joins the next generation."""
        rank = self._ranks[name]
        rank.connection, rank.deaf, rank.frozen = next(self._connections), False, False
        self._by_connection[rank.connection] = rank
        peer, incarnation = replace(rank.join.peer, rank=rank.rank), 1000 + rank.connection
        rank.join = replace(
            rank.join,
            connection=rank.connection,
            peer=peer,
            incarnation=incarnation,
            previous_generation=rank.generation,
        )
        self._ranks[name] = self._by_connection[rank.connection] = Rank(name, rank.rank, rank.connection, rank.join)
        self._handle(rank.join)

    def _do_enroll(self, name: str, options: Options) -> None:
        rank, channels = self._ranks[name], int(options.get("channels", 1))
        signature = LayerSignature(
            channels,
            options.get("dtype", "float32"),
            float(options.get("momentum", 0.9)),
            float(options.get("epsilon", 0.001)),
        )
        state = LayerState(
            Moving(np.full(channels, float(options.get("mean", 0)), np.float32), np.ones(channels, np.float32)),
            Grid.unknown(signature.dtype, channels),
            BackwardGrid.unknown(signature.dtype, channels),
        )
        signature = replace(signature, anew="anew" in options)
        rank.layers[options["layer"]] = Mirror(signature, state)
        self._contribute(rank, Call(Operation.ENROLL, ExchangeKey(options["layer"], None, 0), signature), state)

    def _do_set(self, name: str, options: Options) -> None:
        """A rank sets the moving mean of its mirror; with `grid=none`, its state was never probed."""
        mirror = self._ranks[name].layers[options["layer"]]
        mean = numbers(options["mean"])[0]
        mirror.state, mirror.set = replace(mirror.state, moving=mirror.state.moving._replace(mean=mean)), True
        version = int(options.get("version", mirror.state.version))
        mirror.state = replace(mirror.state, version=version)
        if "grid" in options:
            grids = Grid.unknown("float32", mean.size), BackwardGrid.unknown("float32", mean.size)
            mirror.state = LayerState(mirror.state.moving, *grids, version)

    def _do_forward(self, name: str, options: Options) -> None:
        """A training call; with `rounds=1` the rank falls silent after its first contribution."""
        rank = self._ranks[name]
        rank.contributions = int(options.get("rounds", 9))
        self._begin(rank, forward(rank.layers[options["layer"]], options))

    def _do_backward(self, name: str, options: Options) -> None:
        rank = self._ranks[name]
        self._begin(rank, backward(rank.layers[options["layer"]], options))

    def _do_sums(self, name: str, options: Options) -> None:
        """Raw limbs, one number for all of a channel's: for what no layer would send."""
        signature = LayerSignature(int(options.get("channels", 1)), "float32", 0.9, 0.001)
        limbs = np.full((int(options.get("rows", 6)), signature.channels), int(options["words"]), np.int64)
        key = ExchangeKey(options["layer"], Direction.FORWARD, int(options.get("step", 0)))
        self._contribute(self._ranks[name], Call(Operation.SUMS, key, signature), limbs)

    def _do_again(self, name: str, options: Options) -> None:
        """The last contribution once more."""
        rank = self._ranks[name]
        assert rank.last is not None
        rank.sequence -= 1
        self._contribute(rank, *rank.last)

    def _do_barrier(self, name: str, options: Options) -> None:
        key = ExchangeKey(None, None, int(options.get("step", 0)))
        rank = self._ranks[name]
        if "generation" in options:
            rank.generation = int(options["generation"])
        signature = PlainSignature(ADMIT if "admit" in options else "")
        self._contribute(rank, Call(Operation.BARRIER, key, signature), None)

    def _do_allreduce(self, name: str, options: Options) -> None:
        array = numbers(options["x"])[0].astype(options.get("dtype", "float32"))
        signature = PlainSignature(options.get("op", "sum"), (f"{array.dtype.name}{list(array.shape)}",))
        if "says" in options:
            signature = replace(signature, arrays=(options["says"],))
        self._contribute(self._ranks[name], Call(Operation.REDUCE, ExchangeKey(None, None, 0), signature), (array,))

    def _do_broadcast(self, name: str, options: Options) -> None:
        rank, root = self._ranks[name], int(options["root"])
        body = (numbers(options["x"])[0],) if "x" in options else None
        self._contribute(rank, Call(Operation.BROADCAST, ExchangeKey(None, None, 0), PlainSignature(root=root)), body)

    def _do_pull(self, name: str, options: Options) -> None:
        self._handle(Pull(self._ranks[name].connection, options["layer"]))

    def _do_push(self, name: str, options: Options) -> None:
        """A state that was never probed."""
        mean = numbers(options["mean"])[0]
        grids = Grid.unknown("float32", mean.size), BackwardGrid.unknown("float32", mean.size)
        state = LayerState(Moving(mean, np.ones_like(mean)), *grids)
        rank = self._ranks[name]
        rank.pushes += "again" not in options
        self._handle(Push(rank.connection, options["layer"], state, rank.pushes))

    def _do_leave(self, name: str, options: Options) -> None:
        self._handle(Leave(self._ranks[name].connection, options.get("reason", "")))

    def _do_crash(self, name: str, options: Options) -> None:
        """A connection breaks."""
        rank = self._ranks[name]
        rank.deaf = True
        self._handle(ConnectionEnded(rank.connection))

    def _do_deafen(self, name: str, options: Options) -> None:
        """What the service says does not arrive any more, though nobody has noticed yet."""
        self._ranks[name].deaf = True

    def _do_back(self, name: str, options: Options) -> None:
        """The rank connects again, and repeats what may not have been received; a quiet one, later."""
        rank = self._ranks[name]
        rank.connection, rank.deaf = next(self._connections), False
        self._by_connection[rank.connection] = rank
        layer_answered = int(options.get("knows", rank.layer_answered))
        resume = (
            Resume(rank.generation, rank.answered, layer_answered, dict(rank.versions)) if rank.generation else None
        )
        asked = rank.last if rank.sequence > rank.answered else None
        self._handle(replace(rank.join, connection=rank.connection, resume=resume))
        for sequence, operations in ((rank.answered, rank.before), (rank.answered + 1, asked)):
            if operations is not None and "quiet" not in options:
                self._handle(Contribute(rank.connection, rank.generation, sequence, *operations))

    def _do_freeze(self, name: str, options: Options) -> None:
        """The rank gives no sign of life any more; its connection stands."""
        self._ranks[name].frozen = True

    def _do_restart(self, name: str, options: Options) -> None:
        """The service is killed and started again, from all entries.

        With `shortened=1` from a snapshot; with `lost=1` from nothing.
        """
        records = {job: self._service.records(job) for job in self._service.jobs}
        if "shortened" not in options:
            records = dict(self._written)
        if "lost" in options:
            records = {}
        owned = {job: self._service.states(job) for job in records}
        self._service = Service(records, now=self._now)
        for job, states in owned.items():
            assert _bits(self._service.states(job)) == _bits(states)
        for rank in self._ranks.values():
            rank.deaf = True

    def _do_babble(self, name: str, options: Options) -> None:
        self._handle(Malformed(self._ranks[name].connection, options["text"]))

    def _do_wait(self, name: str, options: Options) -> None:
        for _ in range(round(float(options["seconds"]) * 10)):
            self._tenths += 1
            for rank in self._ranks.values():
                if not (rank.frozen or rank.deaf):
                    self._handle(Heartbeat(rank.join.job, rank.rank, rank.join.incarnation))
            self._handle(Tick())

    def _do_stop(self, name: str, options: Options) -> None:
        self._handle(Stop())

    def _do_show(self, name: str, options: Options) -> None:
        """The owner's state."""
        state = self._service.states("j")[options["layer"]]
        self._lines["owner"].append(described(options["layer"], state))

    # ---- what the ranks and the service say ----

    @property
    def _now(self) -> float:
        return self._tenths / 10

    def _begin(self, rank: Rank, exchange: Exchange) -> None:
        rank.exchange = exchange
        self._contribute(rank, *next(exchange))

    def _contribute(self, rank: Rank, call: Call, body: Body) -> None:
        rank.sequence += 1
        rank.last = (call, body)
        self._handle(Contribute(rank.connection, rank.generation, rank.sequence, call, body))

    def _handle(self, event: Event) -> None:
        if isinstance(event, Contribute | Join | Push):
            rank = self._by_connection[event.connection]
            event = validated(event, rank.join.world_size)
        effects = self._service.handle(event, self._now)
        written = [number for number, effect in enumerate(effects) if isinstance(effect, Record)]
        reported = [number for number, effect in enumerate(effects) if isinstance(effect, Totals | Enrolled | Owned)]
        assert not written or not reported or written[0] < reported[0], "somebody is told what is not written"
        replies = [reply for effect in effects for reply in self._replies(effect)]
        for rank, call, limbs in replies:
            self._contribute(rank, call, limbs)

    def _replies(self, effect: Effect) -> Iterator[tuple[Rank, Call, Body]]:
        if isinstance(effect, Persist | Record | Straggling):
            self._note(effect)
            return
        connections = effect.connections if hasattr(effect, "connections") else (effect.connection,)
        for connection in connections:
            rank = self._by_connection[connection]
            if rank.deaf or connection != rank.connection:
                continue
            if hasattr(effect, "sequence"):
                rank.hears(effect.sequence)
            if isinstance(effect, Totals | Enrolled) and rank.last is not None:
                version = effect.version if isinstance(effect, Totals) else effect.state.version
                rank.versions[rank.last[0].key.layer or ""] = version
            if not isinstance(effect, Totals):
                self._lines[f"rank {rank.name}"].append(_described(effect, rank))
                continue
            assert rank.exchange is not None
            rank.contributions -= 1
            if rank.contributions == 0:
                continue
            try:
                yield rank, *rank.exchange.send(effect)
            except StopIteration as done:
                self._lines[f"rank {rank.name}"].append(f"{done.value}, owner's version {effect.version}")
                self._check_mirrors(rank)

    def _note(self, effect: Persist | Record | Straggling) -> None:
        """What concerns nobody but the service."""
        match effect:
            case Persist():
                self._lines["service"].append(f"saves job {effect.job!r}")
            case Record():
                self._written[effect.job].append(effect.record)
            case Straggling():
                self._lines["service"].append(f"logs of job {effect.job!r}: {effect.text}")

    def _check_mirrors(self, rank: Rank) -> None:
        """A rank that applied the same functions to the same words holds the owner's bits."""
        for name, owned in self._service.states(rank.join.job).items():
            if name in rank.layers:
                mine = rank.layers[name].state.arrays()
                assert all((mine[key] == array).all() for key, array in owned.arrays().items() if key != "flags")


def _described(effect: Any, rank: Rank) -> str:
    match effect:
        case Joined():
            return _joined(effect, rank)
        case Enrolled():
            assert rank.last is not None
            name = str(rank.last[0].key.layer)
            rank.layers[name].state = effect.state
            return f"enrolled: {described(name, effect.state)}, owner's version {effect.state.version}"
        case Reduce():
            return f"total {listed(reduce_in_rank_order(effect.op, effect.contributions)[0])}"
        case Broadcast():
            return f"received {listed(effect.arrays[0])}"
        case Released():
            return "goes on"
        case Owned():
            if effect.state is None:
                return "the owner has no such layer"
            return f"owner's version {effect.state.version}: {described('it', effect.state)}"
        case Closed():
            return "may go"
        case Failed():
            error = error_of(failure_of(effect))
            where = f" (layer {error.layer!r}, step {error.step})" if error.step is not None else ""
            return f"{type(error).__name__}{where}, ranks {list(error.ranks)}: {effect.text}"
        case _:
            raise AssertionError(effect)


def _joined(effect: Joined, rank: Rank) -> str:
    back, rank.generation = rank.generation == effect.generation, effect.generation
    where = f"generation {effect.generation} of job {effect.job!r}"
    if effect.rank is not None:
        rank.rank, where = effect.rank, f"{where} as rank {effect.rank}"
    return f"is back in {where}" if back else f"joined {where}, {effect.world_size} ranks"


def _bits(states: dict[str, LayerState]) -> dict[str, dict[str, bytes]]:
    return {name: {key: array.tobytes() for key, array in state.arrays().items()} for name, state in states.items()}


def _grouped(lines: dict[str, list[str]]) -> list[str]:
    """Each speaker's lines in order; ranks that hear the same things stand together."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in sorted(lines):
        alike[tuple(lines[name])].append(name)
    reported = []
    for operations, names in alike.items():
        who = names[0] if len(names) == 1 else "ranks " + ", ".join(name.removeprefix("rank ") for name in names)
        reported += [f"{who}: {line}" for line in operations]
    return reported
