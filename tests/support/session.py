"""Sessions of ranks against the service's own core, in memory: no clock, socket or thread on either side.

What travels is translated as on the real wire, and waits in queues: whoever plays decides which message is delivered
next, which connection breaks and what is lost with it, and when the service is killed and started again.
A connection has a stream and, for ranks that are local, a socket beside it; each keeps its order, and neither waits for
the other. What was sent on a connection that broke may still arrive, after the next one has begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count

from bnlayer.reduction import reduce_in_rank_order
from bnproto.failures import StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.effects import Broadcast, Closed, Effect, Enrolled, Failed, Owned, Record, Reduce, Released, Totals
from bnserver.core.effects import Joined as AllJoined
from bnserver.core.events import ConnectionEnded
from bnserver.core.events import Event as ServiceEvent
from bnserver.core.journal_records import Ended, JournalRecord
from bnserver.core.members import LivenessTimeouts
from bnserver.core.service import Service
from bnserver.rank_channel import Outgoing, RequestAssembler
from bnserver.translation import Messages, Writer
from bnworker.transports.service import events as happened
from bnworker.transports.service.service_channel import AnswerAssembler
from bnworker.transports.service.session import State
from support.forward_exchange import bits
from support.session_program import Program
from support.session_rank import Down, Link, Rank

_TIMEOUTS = LivenessTimeouts(lease=0.0, away=1e9)  # nobody is lost here: what is tested is that everything completes


class Wire:
    """The service's channel of a connection: what it sends is on its way."""

    unread = 0

    def __init__(self, queue: deque[bytes | Failed | None]) -> None:
        self._queue = queue

    def send(self, messages: Iterable[Outgoing]) -> None:
        """It may yet be lost."""
        self._queue.extend(message.message.SerializeToString() for message in messages)

    def close(self, status: StatusParts | None) -> None:
        """The plays end connections themselves."""


class Play:
    """The service, its ranks, and all that is on its way between them.

    Args:
        program: makes that of a rank, given its number.
        local: which ranks have a local socket.
    """

    def __init__(self, program: Callable[[int], Program], local: tuple[bool, ...]) -> None:
        self.now = 0.0
        self.world_size = len(local)
        self.links: list[Link] = []
        self.written: list[JournalRecord] = []
        self.restarts = 0
        self._connections = count(1)
        self._start(Service(timeouts=_TIMEOUTS))
        self.ranks = [Rank(self, number, program(number), local=way) for number, way in enumerate(local)]

    @property
    def over(self) -> bool:
        """Whether every rank has left."""
        return all(rank.session.state is State.CLOSED for rank in self.ranks)

    @property
    def has_ended_well(self) -> bool:
        """Whether the service knows that all have left, cleanly."""
        return self.written[-1] == Ended(1)

    def owned(self) -> dict[str, bytes]:
        """The bits of what the service owns."""
        return {name: bits(state) for name, state in self.service.states("j").items()}

    def connect(self, rank: int, number: int) -> Link:
        """A new connection."""
        for old in self.links:
            # The service takes the join that arrives last as the rank's: here none is overtaken.
            if old.rank == rank and not old.is_join_read:
                old.up["stream"].clear()
        connection = next(self._connections)
        down: Down = {"stream": deque(), "socket": deque()}
        link = Link(
            rank,
            number,
            Connection(connection, Wire(down["stream"]), self._dispatch),
            {"stream": RequestAssembler(), "socket": RequestAssembler()},
            {"stream": deque(), "socket": deque()},
            down,
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

    def cut(self, rank: int, delivered_up: int, delivered_down: int) -> None:
        """A rank's connection breaks; so much of what is on its way still arrives."""
        link = self.ranks[rank].link
        if link is None or link.broken:
            return
        link.broken = True
        for ways, delivered in ((link.up, delivered_up), (link.down, delivered_down)):
            for messages in ways.values():
                while len(messages) > delivered:
                    messages.pop()

    def lose_channel(self, rank: int) -> None:
        """A rank's local socket breaks, and it notices that first."""
        link = self.ranks[rank].link
        if link is not None and link.joined and not link.broken:
            self.ranks[rank].handle(happened.ChannelBroken(link.number))

    def end_channel(self, link: Link) -> None:
        """The service hears of the end of a socket, and ends the stream."""
        if not link.closed:
            self._lose(link)
            link.down["stream"].append(None)

    def restart(self, *, shortened: bool) -> None:
        """The service is killed, and started again from its journal; or from a snapshot."""
        journals = {"j": self.service.records("j") if shortened else list(self.written)} if self.written else {}
        before = self.owned() if "j" in self.service.jobs else {}
        self.restarts += 1
        self._start(Service(journals, _TIMEOUTS, self.now))
        if journals:
            assert self.owned() == before
        for link in self.links:
            link.broken = link.closed = True
            for messages in link.up.values():
                messages.clear()

    # ---- the service's end ----

    def _start(self, service: Service) -> None:
        self.service = service
        self._writer = Writer(self.restarts + 1, _TIMEOUTS, durable=True)

    def _lose(self, link: Link) -> None:
        link.closed = True
        self._dispatch(ConnectionEnded(link.connection.number))

    def _deliver(self, link: Link, way: str) -> None:
        request = pb.ExchangeRequest.FromString(link.up[way].popleft())
        link.is_join_read = True
        message = link.gathered[way].add(request)
        if message is not None:
            link.connection.receive(*message)

    def _dispatch(self, event: ServiceEvent) -> None:
        self.now += 0.001
        for effect in self.service.handle(event, self.now):
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Record():
                self.written.append(effect.record)
            case AllJoined():
                self._send(effect.connections, self._writer.joined(effect.generation, effect.world_size, None))
                self._attach(effect.connections)
            case Totals() | Enrolled() | Broadcast() | Released():
                self._send(effect.connections, self._writer.result(effect, 1))
            case Reduce():
                arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
                self._send(effect.connections, self._writer.reduced(effect.sequence, 1, arrays))
            case Owned():
                self._send((effect.connection,), self._writer.owned(effect, 1))
            case Failed():
                self._end(effect.connection, effect)
            case Closed():
                self._end(effect.connection, None)

    def _send(self, connections: tuple[int, ...], messages: Messages) -> None:
        for link in self.links:
            if link.connection.number in connections and not link.broken:
                link.connection.channel.send(messages)

    def _attach(self, connections: tuple[int, ...]) -> None:
        """Ranks that have a local socket attach it as soon as they have joined."""
        for link in self.links:
            if link.connection.number in connections and self.ranks[link.rank].local:
                link.connection.channel = Wire(link.down["socket"])

    def _end(self, connection: int, status: Failed | None) -> None:
        for link in self.links:
            if link.connection.number == connection:
                link.closed = True
                if not link.broken:
                    link.down["stream"].append(status)
