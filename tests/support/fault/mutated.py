"""Mutated and random messages against the service in this process, beside a healthy job.

Each visitor is a connection: it says a few messages, of which most are mutated (bits, bytes, lengths), in frames as on
a local socket. The service may refuse them, and nothing else: its own faults, codes that are not documented, and
any trace in the healthy job's statistics are failures.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

import numpy as np
from google.protobuf.message import DecodeError

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnproto.arrays import WireError, pack
from bnproto.calls import contribution_of
from bnproto.failures import StatusParts
from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.events import Tick
from bnserver.core.members import LivenessTimeouts
from bnserver.core.quotas import QuotaError, Quotas
from bnserver.grpc_channel import GrpcChannel
from bnserver.rank_channel import RequestAssembler
from bnserver.retention import Keep
from bnserver.servicer import Servicer

# What the service may say to a visitor, as gRPC's codes; INTERNAL is not among them.
_CODES = frozenset(
    "INVALID_ARGUMENT FAILED_PRECONDITION ABORTED DEADLINE_EXCEEDED RESOURCE_EXHAUSTED DATA_LOSS".split()  # noqa: SIM905
)
_CHANNELS = 3
_MESSAGES = 4  # of a visitor, at most
_HEALTHY_EVERY = 50  # visitors from one exchange of the healthy job to the next
_SIGNATURE = LayerSignature(_CHANNELS, "float32", 0.9, 0.001)
_STATE = LayerState(
    Moving(np.zeros(_CHANNELS, np.float32), np.ones(_CHANNELS, np.float32)),
    Grid.unknown("float32", _CHANNELS),
    BackwardGrid.unknown("float32", _CHANNELS),
)


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        messages: how many were sent.
        codes: how visitors' connections ended, by gRPC's code.
        faults: what must not be.
        resident: bytes of this process, ten times in the run.
    """

    messages: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def attack(seed: int, messages: int) -> Outcome:
    """Send so many messages to a service of our own.

    Args:
        seed: everything follows from it.
        messages: how many, about.
    """
    return asyncio.run(_attack(Random(seed), messages))


class _Listening(logging.Handler):
    """Keeps what the service says of its own faults."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._faults.append(logging.Formatter().format(record))


async def _attack(random: Random, messages: int) -> Outcome:
    outcome = Outcome()
    timeouts = LivenessTimeouts(lease=0, away=0)
    exchanges = Servicer(
        1, None, timeouts=timeouts, keep=Keep(jobs=2), quotas=Quotas(ranks=8, layers=4, channels=64, job_bytes=2**20)
    )
    listening = _Listening(outcome.faults)
    log = logging.getLogger("bnserver")
    log.addHandler(listening)
    try:
        healthy, reference = _Healthy(exchanges), _Healthy(Servicer(1, None, timeouts=timeouts))
        seeds = list(_requests())
        for number in count():
            if number % _HEALTHY_EVERY == 0:
                if healthy.exchanged() != reference.exchanged():
                    outcome.faults.append(f"another answer of the healthy job, before connection {number}")
                exchanges.dispatch(Tick())
                await exchanges.jobs.retention.expire()
                await asyncio.sleep(0)
            if outcome.messages * 10 >= len(outcome.resident) * messages:
                outcome.resident.append(_resident())
            if outcome.messages >= messages or outcome.faults:
                break
            _visit(exchanges, random, seeds, outcome)
    finally:
        log.removeHandler(listening)
    outcome.resident.append(_resident())
    return outcome


class _End:
    """One connection, as its client sees it."""

    def __init__(self, exchanges: Servicer) -> None:
        self._exchanges = exchanges
        self.stream = GrpcChannel()
        self.connection: Connection = exchanges._connect(self.stream)
        self._frames = Frames()
        self._assembler = RequestAssembler(self.connection.account.add)

    def say(self, data: bytes) -> bool:
        """Send bytes; returns whether the service still listens."""
        view = memoryview(data)
        try:
            while view and not self.connection.is_over:
                room = self._frames.room()
                taken = min(len(view), len(room))
                room[:taken] = view[:taken]
                self._frames.received(taken)
                view = view[taken:]
                while (body := self._frames.next()) is not None:
                    if self.connection.is_over:
                        return False
                    assembled = self._assembler.add(pb.ExchangeRequest.FromString(body))
                    if assembled is not None:
                        self.connection.receive(*assembled)
        except (WireError, QuotaError, DecodeError) as error:
            self.connection.garbled(error)
            return False
        return not self.connection.is_over

    def hang_up(self) -> None:
        """End it from this side."""
        del self._exchanges._connections[self.connection.number]
        self.connection.disconnected()

    def received(self) -> list[pb.ExchangeResponse | StatusParts | None]:
        """What has come."""
        self.stream.unread = 0
        return [self.stream.outgoing.get_nowait() for _ in range(self.stream.outgoing.qsize())]


class _Healthy:
    """A job of two ranks that knows nothing of the visitors."""

    def __init__(self, exchanges: Servicer) -> None:
        self._ends = [_End(exchanges) for _ in range(2)]
        self._steps = 0
        for rank, end in enumerate(self._ends):
            end.say(framed(_join("healthy", rank, 2)))
        for end in self._ends:
            end.received()

    def exchanged(self) -> list[object]:
        """All that both ranks are told in a reduction, and by the owner after a push."""
        self._steps += 1
        call = Call(Operation.REDUCE, ExchangeKey(None, None, self._steps - 1), PlainSignature("sum", ("x",)))
        for rank, end in enumerate(self._ends):
            payload, _ = pack([np.random.default_rng([self._steps, rank]).normal(size=8)])
            contribution = contribution_of(call, payload, self._steps, 1)
            end.say(framed(pb.ExchangeRequest(contribution=contribution)))
        state = LayerState(
            Moving(np.full(_CHANNELS, self._steps, np.float32), _STATE.moving.variance), _STATE.forward, _STATE.backward
        )
        self._ends[0].say(framed(_push(state, self._steps)))
        self._ends[1].say(framed(pb.ExchangeRequest(pull=pb.Pull(layer="a"))))
        said = [message for end in self._ends for message in end.received()]
        assert len(said) == 4, said
        return [
            message.SerializeToString(deterministic=True) if isinstance(message, pb.ExchangeResponse) else repr(message)
            for message in said
        ]


def _visit(exchanges: Servicer, random: Random, seeds: list[bytes], outcome: Outcome) -> None:
    """One connection, from its first message to its end."""
    end = _End(exchanges)
    listens = True
    if random.random() < 0.8:  # what it says next is looked at in earnest
        listens = end.say(framed(_join(f"visitor-{random.randrange(8)}", 0, 1)))
        outcome.messages += 1
    for _ in range(random.randint(1, _MESSAGES)):
        if not listens:
            break
        listens = end.say(_mutated(random, seeds))
        outcome.messages += 1
    end.hang_up()
    for message in end.received():
        if isinstance(message, StatusParts):
            outcome.codes[message.code.name] += 1
            if message.code.name not in _CODES:
                outcome.faults.append(f"{message.code.name}: {message.message}")


def _mutated(random: Random, seeds: list[bytes]) -> bytes:
    """A message in its frame, of which something may be another."""
    kind = random.randrange(8)
    data = bytearray(random.choice(seeds))
    if kind == 0:
        data = bytearray(random.randbytes(random.randrange(200)))
    elif kind == 1:  # two messages in one: the fields of the second count, or are added
        data += random.choice(seeds)
    elif kind < 6:
        for _ in range(random.randint(1, 4)):
            _mutate(random, data)
    frame = len(data).to_bytes(4, "little")
    if kind == 7 and random.random() < 0.2:
        frame = random.randbytes(4)
    return frame + data


def _mutate(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data) + 1)
    match random.randrange(5):
        case 0 if at < len(data):
            data[at] ^= 1 << random.randrange(8)
        case 1 if at < len(data):
            data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        case 2:
            data[at:at] = random.randbytes(random.randint(1, 10))
        case 3:
            del data[at : at + random.randint(1, 10)]
        case _:
            data[at:at] = data[random.randrange(len(data) + 1) :][:20]


def _join(job: str, rank: int, size: int) -> pb.ExchangeRequest:
    join = pb.Join(job=job, rank=rank, world_size=size, incarnation=rank + 1, timeout_ms=9000, join_timeout_ms=9000)
    return pb.ExchangeRequest(join=join)


def _push(state: LayerState, number: int) -> pb.ExchangeRequest:
    arrays = state.arrays()
    payload, _ = pack(arrays.values(), tuple(arrays))
    return pb.ExchangeRequest(push=pb.Push(layer="a", dtype="float32", payload=payload, number=number))


def _requests() -> Iterator[bytes]:
    """Valid messages of every kind."""
    limbs, key, enrol = (
        np.zeros((6, _CHANNELS), np.int64),
        ExchangeKey("a", Direction.FORWARD, 0),
        ExchangeKey("a", None, 0),
    )
    arrays = _STATE.arrays()
    state, _ = pack(arrays.values(), tuple(arrays))
    plain = ExchangeKey(None, None, 0)
    contributions = [
        (Call(Operation.ENROLL, enrol, _SIGNATURE), state),
        (Call(Operation.PROBE, key, _SIGNATURE), pack([limbs[:2]])[0]),
        (Call(Operation.SUMS, key, _SIGNATURE), pack([limbs])[0]),
        (Call(Operation.REDUCE, plain, PlainSignature("sum", ("x",))), pack([np.ones(4)])[0]),
        (Call(Operation.BROADCAST, plain, PlainSignature(arrays=("x",))), pack([np.ones(4)])[0]),
        (Call(Operation.BARRIER, plain, PlainSignature()), None),
    ]
    for call, payload in contributions:
        for sequence in (1, 2):
            contribution = contribution_of(call, payload, sequence, 1)
            yield pb.ExchangeRequest(contribution=contribution).SerializeToString()
    in_parts = contribution_of(contributions[3][0], pack([np.ones(4)])[0], 1, 1)
    in_parts.payload.data = in_parts.payload.data[:8]
    resume = pb.ExchangeRequest(
        join=pb.Join(job="visitor-1", world_size=2, incarnation=1, timeout_ms=9, join_timeout_ms=9)
    )
    resume.join.resume.generation = 1
    resume.join.resume.versions["a"] = 1
    elastic = pb.ExchangeRequest(
        join=pb.Join(job="visitor-e", world_size=1, incarnation=3, timeout_ms=9, join_timeout_ms=9)
    )
    elastic.join.elastic.min, elastic.join.elastic.max = 1, 2
    others = (
        pb.ExchangeRequest(contribution=in_parts),
        pb.ExchangeRequest(part=pb.Part(data=bytes(24))),
        _push(_STATE, 1),
        pb.ExchangeRequest(pull=pb.Pull(layer="a")),
        pb.ExchangeRequest(leave=pb.Leave(reason="done")),
        pb.ExchangeRequest(attach=pb.Attach(ticket=bytes(16))),
        resume,
        elastic,
    )
    for request in others:
        yield request.SerializeToString()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
