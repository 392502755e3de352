"""One end of the plays of `support.session`: a rank that runs a program, and its connections."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from bnproto.failures import error_of
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.effects import Failed
from bnserver.rank_channel import RequestAssembler
from bnserver.translation import failure_of
from bnworker.transports.service import actions as do
from bnworker.transports.service import events as happened
from bnworker.transports.service.service_channel import Answer, AnswerAssembler
from bnworker.transports.service.session import Session, State
from support.session_program import Asked, Program

TIMEOUT_S = 300.0
_PART_BYTES = 40  # small, so that contributions travel in parts

Down = dict[str, deque[bytes | Failed | None]]


class Network(Protocol):
    """What a rank needs of the play that it is in."""

    now: float
    world_size: int

    def connect(self, rank: int, number: int) -> Link:
        """A new connection."""

    def end_channel(self, link: Link) -> None:
        """The rank closes its local socket."""


@dataclass(slots=True, eq=False)
class Link:
    """One connection, and the messages that are on their way. The last one down is a `Failed`, or None for a clean end.

    Attributes:
        rank: whose it is.
        number: of the rank's session; the service's is `connection.number`.
        broken: nothing more is sent on it; what is on its way may yet arrive.
        left: the rank has let go of it; `closed`: so has the service.
    """

    rank: int
    number: int
    connection: Connection
    gathered: dict[str, RequestAssembler]
    up: dict[str, deque[bytes]]
    down: Down
    assemblers: dict[str, AnswerAssembler]
    broken: bool = False
    left: bool = False
    closed: bool = False
    joined: bool = False
    is_join_read: bool = False

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

    def __init__(self, network: Network, number: int, program: Program, *, local: bool) -> None:
        self._network = network
        self._program = program
        self.number = number
        self.local = local
        join = pb.Join(
            job="j",
            rank=number,
            world_size=network.world_size,
            host=f"h{number}",
            pid=number,
            join_timeout_ms=300_000,
            timeout_ms=300_000,
            incarnation=1000 + number,
        )
        self.session = Session("service:1", join, TIMEOUT_S, network.now)
        self.link: Link | None = None
        self.results: list[bytes] | None = None
        self.begun = False
        self.next: happened.Event | None = happened.Begin()
        self.asks: happened.Ask | happened.Leave | None = None
        self.in_hand: happened.Received | None = None

    def handle(self, event: happened.Event) -> None:
        """Let the session decide, and do what it says."""
        for action in self.session.handle(event, self._network.now):
            self._perform(action)
        if self.session.state is State.ACTIVE and not self.begun:
            self.begun = True
            self.asks = self._asking(next(self._program))

    def _perform(self, action: do.Action) -> None:
        match action:
            case do.Open():
                self.link = self._network.connect(self.number, action.connection)
                self._send("stream", action.connection, action.requests)
            case do.Send() | do.Repeat():
                self._send(self.way, action.connection, action.requests)
            case do.SendOnStream():
                self._send("stream", action.connection, action.requests)
            case do.Deliver():
                self._go_on(action.answer)
            case do.CloseChannel() if self.link is not None:
                self._network.end_channel(self.link)
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

    def _asking(self, asked: Asked) -> happened.Ask:
        request, payload = asked
        if request.HasField("contribution"):
            request.contribution.sequence = self.session.repetition.answered + 1
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
                self.handle(happened.Joined(link.number, response.generation, durable=True))
            else:
                self.in_hand = happened.Received(link.number, answer)

    def disconnect(self, link: Link, code: str = "UNAVAILABLE") -> None:
        """The rank notices that a connection has ended."""
        link.broken = link.left = True
        self.handle(happened.Disconnected(link.number, code, "x", 0.5))
