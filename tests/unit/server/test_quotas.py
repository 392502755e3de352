"""Quotas at the edge: what exceeds one is refused before anything is allocated for it."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnproto.arrays import pack
from bnproto.calls import contribution_of
from bnproto.grpc_options import PART_BYTES
from bnproto.v1 import statistics_pb2 as pb
from bnserver.bytes_in_flight import BytesInFlight
from bnserver.connection import Connection
from bnserver.core.events import Contribute, Event, Join, Leave, Malformed, Pull, Push
from bnserver.core.quotas import Quotas
from bnserver.core.reasons import Reason
from bnserver.failpoints import Failpoints
from bnserver.grpc_channel import GrpcChannel
from bnserver.rank_channel import Outgoing, RequestAssembler
from bnserver.translation import Reader

_REQUEST_BYTES = 2**10  # that each request counts for beside its payload
_PART = PART_BYTES
_PARTS = 2
_LARGE = np.zeros(_PARTS * _PART // 8 + _PART // 8, np.float64)  # a first message and two parts
_SMALL = np.zeros(8)


class _End:
    """The service's end of a connection: what the core gets of what arrives on it."""

    def __init__(self, quotas: Quotas, in_flight: BytesInFlight | None = None, job: str = "j", size: int = 1) -> None:
        self._events: list[Event] = []
        self.connection = Connection(7, GrpcChannel(), self._events.append, None, quotas, in_flight)
        self._assembler = RequestAssembler(self.connection.account.add)
        self.joined = self.read(_join(job, size))

    def read(self, *messages: pb.ExchangeRequest) -> Event | None:
        """The event that the messages bring about, as a channel reads them."""
        for message in messages:
            try:
                assembled = self._assembler.add(message)
            except ValueError as error:
                self.connection.garbled(error)
                break
            if assembled is not None:
                self.connection.receive(*assembled)
        return self._events.pop() if self._events else None


def _join(job: str, size: int) -> pb.ExchangeRequest:
    return pb.ExchangeRequest(join=pb.Join(job=job, world_size=size, timeout_ms=1, join_timeout_ms=1))


def _reduction(array: np.ndarray[Any, Any]) -> list[pb.ExchangeRequest]:
    payload, parts = pack([array])
    signature = PlainSignature("sum", (f"float64[{array.size}]",))
    call = Call(Operation.REDUCE, ExchangeKey(None, None, 0), signature)
    request = pb.ExchangeRequest(contribution=contribution_of(call, payload, 1, 1))
    return [request, *(pb.ExchangeRequest(part=part) for part in parts)]


def _of_a_layer(operation: Operation, channels: int, shape: tuple[int, ...]) -> pb.ExchangeRequest:
    """A request that announces channels, and brings no number."""
    direction = None if operation is Operation.ENROLL else Direction.FORWARD
    call = Call(operation, ExchangeKey("a", direction, 0), LayerSignature(channels, "float32", 0.9, 0.001))
    payload = pb.Payload(arrays=[pb.Array(name="moving_mean", dtype="int64", shape=shape)])
    return pb.ExchangeRequest(contribution=contribution_of(call, payload, 1, 1))


def _refused(event: Event | None) -> str:
    assert isinstance(event, Malformed), event
    assert event.reason is Reason.QUOTA
    return event.text


_PUSH = pb.Push(layer="a", payload=pb.Payload(arrays=[pb.Array(name="x", dtype="int64", shape=(9,))]))


@pytest.mark.parametrize(
    "request_",
    [
        _of_a_layer(Operation.ENROLL, 9, (8,)),
        _of_a_layer(Operation.ENROLL, 8, (9,)),
        _of_a_layer(Operation.PROBE, 9, (2, 8)),
        _of_a_layer(Operation.SUMS, 9, (6, 8)),
        _of_a_layer(Operation.ENROLL, 8, (90, 1)),
        pb.ExchangeRequest(push=_PUSH),
    ],
)
def test_channels_are_counted_before_an_array_is_made(request_: pb.ExchangeRequest) -> None:
    """A layer of 2^23 channels held every job up for 9 s."""
    assert _refused(_End(Quotas(channels=8)).read(request_)) == (
        "expected at most 8 channels of a layer, received a request for 9; the service's --max-channels raises the "
        "quota"
    )


def test_a_state_of_one_channel_has_three_flags() -> None:
    """They are no channels."""
    state = LayerState(Moving(np.zeros(1), np.ones(1)), Grid.unknown("float64", 1), BackwardGrid.unknown("float64", 1))
    arrays = state.arrays()
    push = pb.Push(layer="a", dtype="float64", payload=pack(arrays.values(), tuple(arrays))[0])
    assert isinstance(_End(Quotas(channels=1)).read(pb.ExchangeRequest(push=push)), Push)


def test_as_many_channels_as_permitted_are_read() -> None:
    """What is wrong with them is another question."""
    event = _End(Quotas(channels=8)).read(_of_a_layer(Operation.SUMS, 8, (6, 8)))
    assert isinstance(event, Malformed)
    assert event.reason is Reason.INVALID


def test_ranks_are_counted() -> None:
    """By the first that joins."""
    assert isinstance(_End(Quotas(ranks=2), size=2).joined, Join)
    text = _refused(_End(Quotas(ranks=2), size=3).joined)
    assert text == (
        "expected at most 2 ranks of a job, received a request for 3; the service's --max-ranks raises the quota"
    )


def test_arrays_are_counted() -> None:
    """Empty ones take no bytes, and as much time."""
    arrays = 2**14 + 1
    contribution = pb.Contribution(payload=pb.Payload(arrays=[pb.Array(dtype="int8", shape=(0,))] * arrays))
    event = _End(Quotas()).read(pb.ExchangeRequest(contribution=contribution))
    assert isinstance(event, Malformed)
    assert event.text == "expected at most 16384 arrays in one contribution, received 16385"


def test_an_announcement_above_the_quota_is_refused_at_once() -> None:
    """And one below it holds nothing but what has arrived."""
    quotas = Quotas(job_bytes=2 * _PART)
    in_flight = BytesInFlight(quotas)
    first, *_ = _reduction(_LARGE)
    text = _refused(_End(quotas, in_flight).read(first))
    assert text == (
        f"expected at most {2 * _PART} bytes in flight of a job, received a request for {3 * _PART}; the service's "
        "--max-job-bytes raises the quota"
    )
    assert in_flight.total == 0
    announced = pb.Payload(arrays=[pb.Array(dtype="int8", shape=(2 * _PART,))], data=b"x", size=2 * _PART)
    begun = pb.ExchangeRequest(contribution=pb.Contribution(payload=announced))
    assert _End(quotas, in_flight).read(begun) is None
    assert in_flight.total == 1 + _REQUEST_BYTES


def test_a_part_brings_something() -> None:
    """Empty ones took the service's time without end, and counted for next to nothing."""
    first, *_ = _reduction(_LARGE)
    event = _End(Quotas()).read(first, pb.ExchangeRequest(part=pb.Part()))
    assert isinstance(event, Malformed)
    assert event.text == "expected a part with data, received an empty one"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("abc", "expected at most 2 layers of a job, received a request for 3; the service's --max-layers raises the "),
        (["x" * 201], "expected names of layers of up to 200 characters, received longer ones"),
    ],
)
def test_what_a_rank_remembers_is_counted(names: Any, text: str) -> None:
    """It is kept for as long as the rank waits for the others: 4 MiB of names took 20 MB for each."""
    join = _join("j", 2)
    join.join.resume.versions.update(dict.fromkeys(names, 1))
    event = Reader(7, Quotas(layers=2)).read(join, b"")
    assert isinstance(event, Malformed)
    assert event.text.startswith(text)


def test_a_rank_may_remember_as_many_layers_as_permitted() -> None:
    """A job at its quota comes back."""
    join = _join("j", 2)
    join.join.resume.versions.update({"a": 1, "b": 2})
    assert isinstance(Reader(7, Quotas(layers=2)).read(join, b""), Join)


@pytest.mark.parametrize("which", ["job_bytes", "total_bytes"])
def test_as_many_bytes_as_permitted_are_held(which: str) -> None:
    """And not one more."""
    in_flight = BytesInFlight(Quotas())
    _End(Quotas(), in_flight).read(*_reduction(_LARGE))
    held = in_flight.total
    for most, kind in ((held, Contribute), (held - 1, Malformed)):
        quotas = Quotas(**{which: most})
        assert isinstance(_End(quotas, BytesInFlight(quotas)).read(*_reduction(_LARGE)), kind)


def test_a_job_holds_no_more_than_its_quota() -> None:
    """Whichever rank brings one part too many; other jobs go on, and what is answered does not count."""
    quotas = Quotas(job_bytes=5 * _PART)
    in_flight = BytesInFlight(quotas)
    ranks = [_End(quotas, in_flight) for _ in range(2)]
    assert isinstance(ranks[0].read(*_reduction(_LARGE)), Contribute)
    assert "bytes in flight of a job" in _refused(ranks[1].read(*_reduction(_LARGE)))
    assert isinstance(_End(quotas, in_flight, "other").read(*_reduction(_LARGE)), Contribute)
    ranks[0].connection.answer([Outgoing(pb.ExchangeResponse())])
    ranks[1].connection.end(None)
    assert in_flight.total == pytest.approx(_LARGE.nbytes, abs=2 * _REQUEST_BYTES)
    assert isinstance(_End(quotas, in_flight).read(*_reduction(_LARGE)), Contribute)


def test_all_jobs_hold_no_more_than_the_quota() -> None:
    """Who sends large arrays is refused then; a small exchange of another job is not."""
    quotas = Quotas(total_bytes=_LARGE.nbytes + 2 * _REQUEST_BYTES)
    in_flight = BytesInFlight(quotas)
    assert isinstance(_End(quotas, in_flight, "greedy").read(*_reduction(_LARGE)), Contribute)
    text = _refused(_End(quotas, in_flight, "late").read(*_reduction(_LARGE)))
    assert f"{_LARGE.nbytes + 2 * _REQUEST_BYTES} bytes in flight of all jobs" in text
    assert text.endswith("the service's --max-bytes raises the quota")
    assert isinstance(_End(quotas, in_flight, "small").read(*_reduction(_SMALL)), Contribute)


def test_what_is_over_is_not_counted() -> None:
    """A connection's end gives all of it back, and a second end nothing more."""
    in_flight = BytesInFlight(Quotas())
    end = _End(Quotas(), in_flight)
    first, part, _ = _reduction(_LARGE)
    end.read(first, part)
    assert in_flight.total > 2 * _PART
    end.connection.disconnected()
    end.connection.disconnected()
    assert in_flight.total == 0


def test_nothing_is_kept_for_who_has_not_joined() -> None:
    """Parts were put together before anybody asked whose they are."""
    events: list[Event] = []
    in_flight = BytesInFlight(Quotas())
    connection = Connection(7, GrpcChannel(), events.append, None, None, in_flight)
    with pytest.raises(ValueError, match="expected one join, as the first request of a stream"):
        RequestAssembler(connection.account.add).add(_reduction(_LARGE)[0])
    assert in_flight.total == 0


def test_written_answers_are_not_counted() -> None:
    """A rank that reads may ask as often as it wants."""

    async def scene() -> None:
        channel = GrpcChannel()
        for _ in range(3):
            channel.send([Outgoing(pb.ExchangeResponse(owned=pb.Owned()))])
        assert channel.unread == 3
        writing = asyncio.create_task(channel.write(AsyncMock(), Failpoints()))
        await asyncio.sleep(0)
        assert channel.unread == 0
        channel.close(None)
        await writing

    asyncio.run(scene())


def test_who_reads_no_answer_is_refused() -> None:
    """A pull is small, and its answer a whole state; a goodbye is always heard."""
    end = _End(Quotas())
    pull = pb.ExchangeRequest(pull=pb.Pull(layer="a"))
    for _ in range(65):
        assert isinstance(end.read(pull), Pull)
        end.connection.answer([Outgoing(pb.ExchangeResponse(owned=pb.Owned()))])
    assert _refused(end.read(pull)) == "expected a rank to read its answers before it asks again; 64 are unread"
    assert isinstance(end.read(pb.ExchangeRequest(leave=pb.Leave())), Leave)
