"""The service's end of a local socket, met by hand: who is let in, what is answered where, and who is shown out."""

import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bnproto.arrays import pack
from bnproto.frames import Frames, framed
from bnproto.grpc_options import CLIENT_OPTIONS
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.local_listener import _ATTACH_WITHIN_S

pytestmark = pytest.mark.rpc

_LIMIT_S = 60.0


class _Hand:
    """A stream and its local socket, without a rank's caution."""

    def __init__(self, address: str, job: str, rank: int = 0, world_size: int = 1) -> None:
        self.channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
        self.requests: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self.responses = rpc.StatisticsServiceStub(self.channel).Exchange(iter(self.requests.get, None))
        join = pb.Join(job=job, rank=rank, world_size=world_size, join_timeout_ms=60_000, timeout_ms=60_000)
        self.requests.put(pb.ExchangeRequest(join=join))

    @cached_property
    def joined(self) -> pb.ExchangeResponse:
        """What the service says when all ranks are there."""
        return next(self.responses)

    @property
    def invitation(self) -> pb.LocalSocket:
        return self.joined.joined.local_socket

    def close(self) -> None:
        self.requests.put(None)
        self.channel.close()

    def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends."""
        with pytest.raises(grpc.RpcError):
            next(self.responses)
        return self.responses.code(), str(self.responses.details())


class _Plug:
    """A local socket, byte by byte."""

    def __init__(self, invitation: pb.LocalSocket) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_LIMIT_S)
        self.socket.connect(f"\0{invitation.name}")
        self.frames = Frames()

    def send(self, *messages: pb.ExchangeRequest) -> None:
        self.socket.sendall(b"".join(map(framed, messages)))

    def hear(self) -> pb.ExchangeResponse | None:
        """The next message; None where the service has hung up."""
        while (data := self.frames.next()) is None:
            try:
                count = self.socket.recv_into(self.frames.room())
            except ConnectionResetError:
                return None
            if not count:
                return None
            self.frames.received(count)
        return pb.ExchangeResponse.FromString(data)

    def attach(self, ticket: bytes) -> pb.ExchangeResponse | None:
        self.send(pb.ExchangeRequest(attach=pb.Attach(ticket=ticket)))
        return self.hear()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def hand(serve: Callable[..., Any]) -> Iterator[_Hand]:
    """One rank's stream."""
    with closing(_Hand(serve().address, "hand")) as stream:
        yield stream


@pytest.fixture
def plug(hand: _Hand) -> Iterator[_Plug]:
    """A local socket, not attached to anything."""
    with closing(_Plug(hand.invitation)) as end:
        yield end


def _barrier(sequence: int) -> pb.ExchangeRequest:
    contribution = pb.Contribution(
        sequence=sequence,
        generation=1,
        operation=pb.OPERATION_BARRIER,
        step=sequence - 1,
        plain_signature=pb.PlainSignature(root=-1),
    )
    return pb.ExchangeRequest(contribution=contribution)


def test_what_is_asked_there_is_answered_there(hand: _Hand, plug: _Plug) -> None:
    """From the moment when it is attached; a goodbye ends both."""
    attached = plug.attach(hand.invitation.ticket)
    assert attached is not None
    assert attached.HasField("attached")
    assert attached.boot_id == hand.joined.boot_id
    for sequence in (1, 2):
        plug.send(_barrier(sequence))
        heard = plug.hear()
        assert heard is not None
        assert heard.result.sequence == sequence
    plug.send(pb.ExchangeRequest(leave=pb.Leave()))
    assert plug.hear() is None
    assert list(hand.responses) == []


def _large(sequence: int) -> list[pb.ExchangeRequest]:
    """A reduction that travels in parts."""
    payload, parts = pack([np.arange(400_000.0)])
    signature = pb.PlainSignature(op="sum", arrays=["float64[400000]"], root=-1)
    contribution = pb.Contribution(
        sequence=sequence, generation=1, operation=pb.OPERATION_REDUCE, plain_signature=signature, payload=payload
    )
    return [pb.ExchangeRequest(contribution=contribution), *(pb.ExchangeRequest(part=part) for part in parts)]


@pytest.mark.fault
def test_a_goodbye_is_heard_in_the_middle_of_a_message(hand: _Hand, plug: _Plug) -> None:
    """A rank that was interrupted says it on the stream."""
    plug.attach(hand.invitation.ticket)
    *most, last = _large(1)
    plug.send(*most)
    plug.socket.sendall(framed(last)[:-1])
    hand.requests.put(pb.ExchangeRequest(leave=pb.Leave(reason="failed")))
    assert list(hand.responses) == []
    assert plug.hear() is None


@pytest.mark.fault
def test_the_stream_ends_with_its_socket(hand: _Hand, plug: _Plug) -> None:
    """So that a rank hears there that its socket is gone, and makes both anew."""
    plug.attach(hand.invitation.ticket)
    plug.close()
    assert list(hand.responses) == []


@pytest.mark.parametrize("ticket", [b"", b"0123456789abcdef"])
def test_a_wrong_ticket_is_shown_out(hand: _Hand, plug: _Plug, ticket: bytes) -> None:
    """And the stream's own rank still gets in."""
    assert plug.attach(ticket) is None
    with closing(_Plug(hand.invitation)) as mine:
        assert mine.attach(hand.invitation.ticket) is not None


def test_a_ticket_is_good_once(hand: _Hand, plug: _Plug) -> None:
    """Whoever has overheard it comes too late."""
    assert plug.attach(hand.invitation.ticket) is not None
    with closing(_Plug(hand.invitation)) as other:
        assert other.attach(hand.invitation.ticket) is None
    plug.send(_barrier(1))
    assert plug.hear() is not None


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x41\0\0\0", b"\x02\0\0\0\xff\xff"])
def test_a_stranger_may_say_a_ticket_and_nothing_else(plug: _Plug, data: bytes) -> None:
    """Neither much nor nonsense: it is shown out at once, long before its time is over."""
    plug.socket.settimeout(_ATTACH_WITHIN_S / 2)
    plug.socket.sendall(data)
    assert plug.hear() is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff\xff\xff\xff", "expected a message of at most 4194304 bytes, received one of 4294967295"),
        (b"\x02\0\0\0\xff\xff", "Error parsing message"),
    ],
)
def test_nonsense_costs_its_own_stream(hand: _Hand, plug: _Plug, data: bytes, why: str) -> None:
    """The rank is told what was expected, on its stream."""
    plug.attach(hand.invitation.ticket)
    plug.socket.sendall(data)
    code, text = hand.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert why in text
    assert plug.hear() is None


@pytest.mark.fault
def test_nonsense_is_read_once(serve: Callable[..., Any]) -> None:
    """Megabytes of it held up every other job, and each message of it was logged."""
    service = serve()
    with (
        closing(_Hand(service.address, "wild")) as wild,
        closing(_Hand(service.address, "calm")) as calm,
        closing(_Plug(wild.invitation)) as plug,
        closing(_Plug(calm.invitation)) as other,
    ):
        plug.attach(wild.invitation.ticket)
        other.attach(calm.invitation.ticket)
        with suppress(ConnectionError):
            plug.socket.sendall(b"\0" * 2**21)
        other.send(_barrier(1))
        heard = other.hear()
        assert heard is not None
        assert heard.result.sequence == 1
        assert wild.status()[0] is grpc.StatusCode.INVALID_ARGUMENT
    _, _, err = service.end(signal.SIGTERM)
    assert err.count("expected a request, received an empty message") == 1
    assert "Traceback" not in err


@pytest.mark.fault
def test_what_nobody_reads_is_dropped_with_its_stream(serve: Callable[..., Any]) -> None:
    """A rank that asked for much and read nothing of it left its socket, and the answer, in the service for good."""
    service = serve()
    folder = Path(f"/proc/{service.popen.pid}/fd")
    with closing(_Hand(service.address, "stays")) as stays:
        stays.joined  # noqa: B018 - waits until it has joined
        before = len(list(folder.iterdir()))
        hand = _Hand(service.address, "lazy")
        with closing(_Plug(hand.invitation)) as plug:
            plug.attach(hand.invitation.ticket)
            plug.send(*_large(1))
            plug.frames.room()
            assert plug.socket.recv(1, socket.MSG_PEEK)  # the answer has begun
            hand.close()
            deadline = time.monotonic() + _LIMIT_S
            while len(list(folder.iterdir())) > before:
                assert time.monotonic() < deadline
