"""Sessions of ranks against the service's own core, in memory: no clock, socket or thread on either side.

What travels is translated as on the real wire, and waits in queues: whoever plays decides which message is delivered
next, which connection breaks and what is lost with it, and when the service is killed and started again.
A connection has a stream and, for ranks that are local, a socket beside it; each keeps its order, and neither waits for
the other. What was sent on a connection that broke may still arrive, after the next one has begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.exchange import ForwardExchange
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.moving import Moving, Rule
from bnlayer.reduction import reduce_in_rank_order
from bnlayer.state import LayerState
from bnproto.arrays import named, unpack, whole
from bnproto.calls import contribution_of
from bnproto.failures import error_of
from bnproto.v1 import statistics_pb2 as pb
from bnserver.core.effects import Broadcast, Closed, Effect, Enrolled, Failed, Owned, Record, Reduce, Released, Totals
from bnserver.core.effects import Joined as AllJoined
from bnserver.core.events import Event as ServiceEvent
from bnserver.core.events import Lost
from bnserver.core.journal_records import Ended, JournalRecord
from bnserver.core.members import LivenessTimeouts
from bnserver.core.service import Service
from bnserver.translation import Reader, Writer, failure_of
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.channel import Answer, AnswerAssembler
from bnworker.transports.service.session import Session, State

TIMEOUT_S = 300.0
_PATIENCE = LivenessTimeouts(lease=0.0, away=1e9)  # nobody is lost here: what is tested is that everything completes
_PART_BYTES = 40  # small, so that contributions travel in parts

Program = Generator[tuple[pb.ExchangeRequest, pb.Payload | None], Answer, list[bytes]]


@dataclass(slots=True, eq=False)
class Link:
    """One connection, and the messages that are on their way. The last one down is a `Failed`, or None for a clean end.

    Attributes:
        rank: whose it is.
        number: of the rank's session; `stream` is the service's.
        broken: nothing more is sent on it; what is on its way may yet arrive.
        left: the rank has let go of it; `closed`: so has the service.
    """

    rank: int
    number: int
    stream: int
    readers: dict[str, Reader]
    up: dict[str, deque[bytes]]
    down: dict[str, deque[bytes | Failed | None]]
    assemblers: dict[str, AnswerAssembler]
    broken: bool = False
    left: bool = False
    closed: bool = False
    joined: bool = False

    @property
    def is_answer_next(self) -> bool:
        """Whether what comes next down the stream is an answer."""
        head = self.down["stream"][0]
        return isinstance(head, bytes) and not pb.ExchangeResponse.FromString(head).HasField("joined")


class Rank:
    """A rank that runs a program: a thread that asks and takes answers, and the client's own.

    Attributes:
        results: what the program returned; None while it runs.
        next: what the client's own thread does next: an event that follows from an action.
        asks: what the rank's thread asks for next, when it has computed for a while.
        in_hand: an answer that it has received, and not looked at yet.
    """

    def __init__(self, play: Play, number: int, program: Program, *, local: bool) -> None:
        self._play = play
        self._program = program
        self.number = number
        self.local = local
        join = pb.Join(
            job="j",
            rank=number,
            world_size=play.world_size,
            host=f"h{number}",
            pid=number,
            join_timeout_ms=300_000,
            timeout_ms=300_000,
            incarnation=1000 + number,
        )
        self.session = Session("service:1", join, TIMEOUT_S, play.now)
        self.link: Link | None = None
        self.results: list[bytes] | None = None
        self.begun = False
        self.next: happened.Event | None = happened.Begin()
        self.asks: happened.Ask | happened.Leave | None = None
        self.in_hand: happened.Received | None = None

    def handle(self, event: happened.Event) -> None:
        """Let the session decide, and do what it says."""
        for action in self.session.handle(event, self._play.now):
            self._perform(action)
        if self.session.state is State.ACTIVE and not self.begun:
            self.begun = True
            self.asks = self._asking(next(self._program))

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.Open():
                self.link = self._play.connect(self.number, action.connection)
                self._send("stream", action.connection, action.requests)
            case do.Send() | do.Repeat():
                self._send(self.way, action.connection, action.requests)
            case do.SendOnStream():
                self._send("stream", action.connection, action.requests)
            case do.Deliver():
                self._go_on(action.answer)
            case do.CloseChannel() if self.link is not None:
                self._play.end_channel(self.link)
            case do.HangUp() if self.link is not None:
                self.link.broken = self.link.left = True
            case do.Probe():
                raise AssertionError("this service keeps its jobs: there is nothing to find out")
        match action:
            case do.Repeat():
                self.next = happened.Repeated(action.connection)
            case do.Pause():
                self.next = happened.PauseOver()

    @property
    def way(self) -> str:
        """What carries requests and answers."""
        return "socket" if self.local else "stream"

    def _send(self, way: str, connection: int, requests: happened.Requests) -> None:
        assert self.link is not None
        assert self.link.number == connection
        if not self.link.broken:
            self.link.up[way].extend(request.SerializeToString() for request in requests)

    def _go_on(self, answer: Answer) -> None:
        try:
            self.asks = self._asking(self._program.send(answer))
        except StopIteration as end:
            self.results = end.value
            self.asks = happened.Leave("")

    def _asking(self, asked: tuple[pb.ExchangeRequest, pb.Payload | None]) -> happened.Ask:
        request, payload = asked
        if request.HasField("contribution"):
            request.contribution.sequence = self.session.answered + 1
            request.contribution.generation = self.session.generation
        parts = []
        if payload is not None:
            sent = request.contribution.payload if request.HasField("contribution") else request.push.payload
            sent.CopyFrom(payload)
            data = payload.data
            sent.data = data[:_PART_BYTES]
            cuts = range(_PART_BYTES, len(data), _PART_BYTES)
            parts = [pb.ExchangeRequest(part=pb.Part(data=data[cut : cut + _PART_BYTES])) for cut in cuts]
        return happened.Ask([request, *parts])

    def step(self, what: Literal["next", "asks", "in_hand"]) -> None:
        """Do what one of its threads does next."""
        event = getattr(self, what)
        setattr(self, what, None)
        self.handle(event)

    def listens(self, link: Link, way: str) -> bool:
        """Whether one of its threads would receive what comes next on its connection."""
        if way == "stream" and not link.is_answer_next:
            return self.next is None  # the client's own thread does one thing after the other
        waits = self.asks is None and self.session.state in (State.ACTIVE, State.AWAY)
        return self.begun and self.in_hand is None and (waits or self.session.state is State.LEAVING)

    def receive(self, link: Link, way: str) -> None:
        """The next message on a connection that this rank still listens to."""
        message = link.down[way].popleft()
        if message is None:
            self.disconnect(link, "OK")
        elif isinstance(message, Failed):
            link.left = True
            self.handle(happened.Refused(link.number, error_of(failure_of(message))))
        else:
            answer = link.assemblers[way].add(pb.ExchangeResponse.FromString(message))
            if answer is None:
                return
            response = answer.response
            if response.HasField("joined"):
                link.joined = True
                self.handle(happened.Joined(link.number, response.boot_id, response.generation, durable=True))
            else:
                self.in_hand = happened.Received(link.number, answer)

    def disconnect(self, link: Link, code: str = "UNAVAILABLE") -> None:
        """The rank notices that a connection has ended."""
        link.broken = link.left = True
        self.handle(happened.Disconnected(link.number, code, "x", 0.5))


class Play:
    """The service, its ranks, and all that is on its way between them.

    Args:
        programs: of the ranks, given their number.
        local: which ranks have a local socket.
    """

    def __init__(self, program: Callable[[int], Program], local: tuple[bool, ...]) -> None:
        self.now = 0.0
        self.world_size = len(local)
        self.links: list[Link] = []
        self.written: list[JournalRecord] = []
        self.restarts = 0
        self._streams = count(1)
        self._start(Service(timeouts=_PATIENCE))
        self.ranks = [Rank(self, number, program(number), local=way) for number, way in enumerate(local)]

    @property
    def over(self) -> bool:
        """Whether every rank has left."""
        return all(rank.session.state is State.CLOSED for rank in self.ranks)

    @property
    def is_generation_over(self) -> bool:
        """Whether the service knows that all have left."""
        return isinstance(self.written[-1], Ended)

    def owned(self) -> dict[str, bytes]:
        """The bits of what the service owns."""
        return {name: bits(state) for name, state in self.service.states("j").items()}

    def connect(self, rank: int, number: int) -> Link:
        """A new connection."""
        stream = next(self._streams)
        link = Link(
            rank,
            number,
            stream,
            {"stream": Reader(stream)},
            {"stream": deque(), "socket": deque()},
            {"stream": deque(), "socket": deque()},
            {"stream": AnswerAssembler(), "socket": AnswerAssembler()},
        )
        self.links.append(link)
        return link

    # ---- what can happen next ----

    def moves(self) -> list[Callable[[], None]]:
        """Whatever the machines may do next, without a fault."""
        moves: list[Callable[[], None]] = []
        for rank in self.ranks:
            if rank.next is not None:
                moves.append(partial(rank.step, "next"))
            if rank.asks is not None:
                moves.append(partial(rank.step, "asks"))
            if rank.in_hand is not None:
                moves.append(partial(rank.step, "in_hand"))
        self.links = [link for link in self.links if not (link.closed and link.left)]
        for link in self.links:
            moves += self._moves_up(link)
            moves += self._moves_down(link, self.ranks[link.rank])
        return moves

    def _moves_up(self, link: Link) -> list[Callable[[], None]]:
        """What the service may receive next on a connection."""
        if link.closed:
            return []
        moves: list[Callable[[], None]] = [partial(self._deliver, link, way) for way, sent in link.up.items() if sent]
        if link.broken and not moves:
            moves.append(partial(self._lose, link))
        return moves

    def _moves_down(self, link: Link, rank: Rank) -> list[Callable[[], None]]:
        """What a rank may receive next on a connection; or it notices that it broke, and the rest is dropped."""
        if link.left:
            return []
        moves: list[Callable[[], None]] = []
        for way, sent in link.down.items():
            if sent and rank.listens(link, way):
                moves.append(partial(rank.receive, link, way))
        if link.broken and rank.next is None:
            moves.append(partial(rank.disconnect, link))
        return moves

    def cut(self, rank: int, kept_up: int, kept_down: int) -> None:
        """A rank's connection breaks; so much of what is on its way still arrives."""
        link = self.ranks[rank].link
        if link is None or link.broken:
            return
        link.broken = True
        for ways, kept in ((link.up, kept_up), (link.down, kept_down)):
            for messages in ways.values():
                while len(messages) > kept:
                    messages.pop()

    def lose_channel(self, rank: int) -> None:
        """A rank's local socket breaks, and it notices that first."""
        link = self.ranks[rank].link
        if link is not None and link.joined and not link.broken:
            self.ranks[rank].handle(happened.ChannelLost(link.number))

    def end_channel(self, link: Link) -> None:
        """The service hears of the end of a socket, and ends the stream."""
        if not link.closed:
            self._lose(link)
            link.down["stream"].append(None)

    def restart(self, *, shortened: bool) -> None:
        """The service is killed, and started again from its journal; or from a snapshot."""
        past = {"j": self.service.records("j") if shortened else list(self.written)} if self.written else {}
        before = self.owned() if "j" in self.service.jobs else {}
        self.restarts += 1
        self._start(Service(past, _PATIENCE, self.now))
        if past:
            assert self.owned() == before
        for link in self.links:
            link.broken = link.closed = True
            for messages in link.up.values():
                messages.clear()

    # ---- the service's end ----

    def _start(self, service: Service) -> None:
        self.service = service
        self._writer = Writer(self.restarts + 1, _PATIENCE, durable=True)

    def _lose(self, link: Link) -> None:
        link.closed = True
        self._dispatch(Lost(link.stream))

    def _deliver(self, link: Link, way: str) -> None:
        request = pb.ExchangeRequest.FromString(link.up[way].popleft())
        if way not in link.readers:
            link.readers[way] = link.readers["stream"].beside()
        event = link.readers[way].read(request)
        if event is not None:
            self._dispatch(event)

    def _dispatch(self, event: ServiceEvent) -> None:
        self.now += 0.001
        for effect in self.service.handle(event, self.now):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Record():
                self.written.append(effect.record)
            case AllJoined():
                self._send(effect.streams, self._writer.joined(effect.generation, effect.world_size, None), "stream")
            case Totals() | Enrolled() | Broadcast() | Released():
                self._send(effect.streams, self._writer.result(effect, 1))
            case Reduce():
                arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
                self._send(effect.streams, self._writer.reduced(effect.sequence, 1, arrays))
            case Owned():
                self._send((effect.stream,), self._writer.owned(effect, 1))
            case Failed():
                self._end(effect.stream, effect)
            case Closed():
                self._end(effect.stream, None)

    def _send(self, streams: tuple[int, ...], messages: list[pb.ExchangeResponse], way: str = "") -> None:
        for link in self.links:
            if link.stream in streams and not link.broken:
                queue = link.down[way or self.ranks[link.rank].way]
                queue.extend(message.SerializeToString() for message in messages)

    def _end(self, stream: int, status: Failed | None) -> None:
        for link in self.links:
            if link.stream == stream:
                link.closed = True
                if not link.broken:
                    link.down["stream"].append(status)


# ---- a program of the ranks ----

_SIGNATURE = LayerSignature(2, "float32", 0.9, 0.001)
_RULE = Rule(_SIGNATURE.momentum, _SIGNATURE.epsilon)


def bits(state: LayerState) -> bytes:
    """All that a state holds."""
    return b"".join(array.tobytes() for array in state.arrays().values())


def train(rank: int, steps: int) -> Program:
    """Enrol a layer, then train it with plain operations in between; returns the bits of all that was received."""
    moving = Moving(np.zeros(2, np.float32), np.ones(2, np.float32))
    state = LayerState(moving, Grid.unknown("float32", 2), BackwardGrid.unknown("float32", 2))
    key = ExchangeKey("a", None, 0)
    state = _state((yield _contribution(Call(Operation.ENROLL, key, _SIGNATURE), state.arrays())).response.result)
    got: list[bytes] = [bits(state)]
    for step in range(steps):
        version, exchange = 0, ForwardExchange.begin(state.forward, _SIGNATURE.epsilon, False)
        x = np.full((rank + 1, 2, 1), 0.5 * step - rank, np.float32) * np.float32(10.0**step)
        while exchange.wants is not None:
            signature = LayerSignature(2, "float32", 0.9, 0.001, grid=exchange.fingerprint)
            call = Call(exchange.wants, ExchangeKey("a", Direction.FORWARD, step), signature, exchange.attempt)
            answer = yield _contribution(call, {"": _limbs(exchange, x)})
            (total,) = unpack(answer.response.result.payload, answer.data)
            version, exchange = answer.response.result.version, exchange.reduced(total)
            got.append(total.tobytes())
        assert exchange.statistics is not None
        state = state.after_forward(exchange.statistics, exchange.grid, _RULE)
        assert version == state.version
        call = Call(Operation.REDUCE, ExchangeKey(None, None, 3 * step), PlainSignature("sum", ("float64[30]",)))
        got.append(bytes((yield _contribution(call, {"": np.full(30, 0.1 * (rank + step))})).data))
        root = step % 2
        call = Call(Operation.BROADCAST, ExchangeKey(None, None, 3 * step + 1), PlainSignature(root=root))
        answer = yield _contribution(call, {"": np.array([step])} if rank == root else None)
        got.append(np.array([step]).tobytes() if rank == root else bytes(answer.data))
        if rank == 0:  # the owner's version goes up; everybody fetches it
            request = pb.ExchangeRequest(push=pb.Push(layer="a", dtype="float32", number=step + 1))
            yield request, _payload(state.arrays())
        yield _contribution(Call(Operation.BARRIER, ExchangeKey(None, None, 3 * step + 2), PlainSignature()), None)
        answer = yield pb.ExchangeRequest(pull=pb.Pull(layer="a")), None
        state = _state(answer.response.owned)
        got.append(bits(state))
        answer = yield pb.ExchangeRequest(pull=pb.Pull(layer="another")), None
        assert not answer.response.owned.known  # answers to pulls have no number
    return got


def _contribution(call: Call, arrays: dict[str, NDArray[Any]] | None) -> tuple[pb.ExchangeRequest, pb.Payload | None]:
    payload = None if arrays is None else _payload(arrays)
    return pb.ExchangeRequest(contribution=contribution_of(call, None, 0, 0)), payload


def _payload(arrays: dict[str, NDArray[Any]]) -> pb.Payload:
    return whole(arrays.values(), tuple(arrays))


def _state(message: pb.Result | pb.Owned) -> LayerState:
    return LayerState.from_arrays(named(message.payload, message.payload.data), "float32")


def _limbs(exchange: ForwardExchange, x: NDArray[np.float32]) -> NDArray[np.int64]:
    if exchange.wants is Operation.PROBE:
        return reference.probe(x, None, exchange.grid)
    return reference.moments(x, None, exchange.grid)
