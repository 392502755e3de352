"""The way around gRPC on one machine: when it is taken, what happens when it ends, and who is shown out."""

import queue
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing
from functools import cached_property
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnproto.arrays import pack
from bnproto.channel import CLIENT_OPTIONS
from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.local import _ATTACH_WITHIN_S
from bnworker import World
from bnworker.transports import local
from bnworker.transports.service import ServiceTransport
from bnworker.transports.stream import Stream
from support.fault.faults import HEALTHY
from support.fault.proxy import proxy

pytestmark = pytest.mark.rpc

_LIMIT_S = 20.0


def _joined(address: str, rank: int = 0, world_size: int = 1, *, local_socket: bool = True) -> tuple[World, Stream]:
    transport = ServiceTransport(address, "job", rank, world_size, timeout=_LIMIT_S, local_socket=local_socket)
    return World(transport, install=False), transport._stream


def _both(address: str) -> list[tuple[World, Stream]]:
    with futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: _joined(address, rank, 2), range(2)))


# ---- when it is taken ----


def test_it_is_taken_on_one_machine(serve: Callable[..., Any]) -> None:
    """By itself; exchanges then go over it alone."""
    world, stream = _joined(serve().address)
    with world:
        assert stream.local
        (total,) = world.allreduce([np.arange(5.0)])
        assert total.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert stream._connection is not None
        assert stream._connection.requests.empty()
        assert stream.local


def test_it_can_be_turned_off(serve: Callable[..., Any]) -> None:
    """Everything then goes over the stream."""
    world, stream = _joined(serve().address, local_socket=False)
    with world:
        assert not stream.local
        world.barrier()
        assert not stream.local


def test_whoever_comes_through_something_in_between_stays_on_the_stream(serve: Callable[..., Any]) -> None:
    """A tunnel or a proxy stands there for a reason."""
    with proxy(serve().address, 1, lambda rank, number: HEALTHY) as between:
        world, stream = _joined(between.addresses[0])
        with world:
            world.barrier()
            assert not stream.local


def test_where_nobody_listens_the_stream_does(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another network namespace, which can't see the socket's name."""
    original = local.LocalSocket

    def elsewhere(invitation: pb.LocalSocket, boot_id: int) -> local.LocalSocket:
        return original(pb.LocalSocket(name="nobody", ticket=invitation.ticket), boot_id)

    monkeypatch.setattr(local, "LocalSocket", elsewhere)
    world, stream = _joined(serve().address)
    with world:
        assert not stream.local
        world.barrier()


def test_another_service_is_not_taken_for_this_one(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot id says which run of the service answers."""
    original = local.LocalSocket
    monkeypatch.setattr(local, "LocalSocket", lambda invitation, boot_id: original(invitation, boot_id + 1))
    world, stream = _joined(serve().address)
    with world:
        world.barrier()
        assert not stream.local


def test_a_service_that_is_back_invites_again(serve: Callable[..., Any], tmp_path: Any) -> None:
    """After kill -9 and a restart, the next connection has a local socket, too."""
    service = serve("--state-dir", str(tmp_path))
    world, stream = _joined(service.address)
    with world:
        world.barrier()
        service.end(signal.SIGKILL)
        serve("--listen", service.address, "--state-dir", str(tmp_path))
        world.barrier()
        world.barrier()
        assert stream.local


# ---- when it ends ----


@pytest.mark.fault
def test_an_answer_comes_on_the_stream_where_the_socket_has_ended(serve: Callable[..., Any]) -> None:
    """While a rank waits for it; the job goes on, and counts everything once."""
    (one, stream), (two, _) = _both(serve().address)
    layers = [BatchNormalization(synchronized=True, name="a", collective=world) for world in (one, two)]
    x = np.ones((4, 3), np.float32)
    with futures.ThreadPoolExecutor(2) as pool:

        def both(*calls: Callable[[], Any]) -> list[Any]:
            return [future.result(_LIMIT_S) for future in [pool.submit(call) for call in calls]]

        both(lambda: layers[0](x, training=True), lambda: layers[1](x, training=True))
        assert stream._connection is not None
        mine = stream._connection.local
        assert mine is not None
        waits = pool.submit(lambda: layers[0](x, training=True))
        while not stream.memory.asked:  # it has asked, on the socket
            assert not waits.done()
        mine.end()
        layers[1](x, training=True)
        waits.result(_LIMIT_S)
        assert not stream.local
        both(lambda: layers[0](x, training=True), lambda: layers[1](x, training=True))
        for layer, world in zip(layers, (one, two), strict=True):
            mirror = layer.state
            world.pull(layer)
            assert layer.state.version == mirror.version == 3
        both(one.leave, two.leave)


@pytest.mark.fault
def test_an_answer_that_is_lost_with_the_socket_is_asked_for_again(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has sent it there already, and counts the question once."""
    world, stream = _joined(serve().address)
    with world:
        assert stream._connection is not None
        mine = stream._connection.local
        assert mine is not None
        hear = mine.hear

        def lost(timeout: float) -> None:
            assert hear(timeout) is not None
            raise ConnectionResetError

        monkeypatch.setattr(mine, "hear", lost)
        (total,) = world.allreduce([np.arange(3)])
        assert total.tolist() == [0, 1, 2]
        assert not stream.local
        world.barrier()


@pytest.mark.fault
def test_what_can_not_be_sent_goes_over_the_stream(serve: Callable[..., Any]) -> None:
    """A socket that ended between two exchanges is noticed when the next one is sent."""
    world, stream = _joined(serve().address)
    with world:
        assert stream._connection is not None
        assert stream._connection.local is not None
        stream._connection.local._socket.shutdown(socket.SHUT_RDWR)
        big = np.arange(400_000.0)  # travels in parts
        (total,) = world.allreduce([big])
        assert np.array_equal(total, big)
        assert not stream.local
        world.barrier()


@pytest.mark.fault
def test_an_interrupt_ends_it(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received when Ctrl-C came may be lost: nothing that follows is read from there."""
    (one, stream), (two, _) = _both(serve().address)
    assert stream._connection is not None
    mine = stream._connection.local
    assert mine is not None

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.barrier()
    assert not stream.local
    assert mine._socket.fileno() == -1
    one.leave()
    two.leave()


# ---- by hand ----


class _Hand:
    """A stream and its local socket, without a rank's caution."""

    def __init__(self, address: str, job: str, rank: int = 0, world_size: int = 1) -> None:
        self.channel = grpc.insecure_channel(address, CLIENT_OPTIONS)
        self.requests: queue.SimpleQueue[pb.ExchangeRequest | None] = queue.SimpleQueue()
        self.responses = rpc.StatisticsServiceStub(self.channel).Exchange(iter(self.requests.get, None))
        join = pb.Join(job=job, rank=rank, world_size=world_size, join_timeout_ms=20_000, timeout_ms=20_000)
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
            self.frames.came(count)
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
        plain_terms=pb.PlainTerms(root=-1),
    )
    return pb.ExchangeRequest(contribution=contribution)


def test_an_answer_comes_the_way_its_request_came(hand: _Hand, plug: _Plug) -> None:
    """On either, in turns."""
    attached = plug.attach(hand.invitation.ticket)
    assert attached is not None
    assert attached.HasField("attached")
    assert attached.boot_id == hand.joined.boot_id
    plug.send(_barrier(1))
    heard = plug.hear()
    assert heard is not None
    assert heard.result.sequence == 1
    hand.requests.put(_barrier(2))
    assert next(hand.responses).result.sequence == 2
    plug.send(_barrier(3))
    heard = plug.hear()
    assert heard is not None
    assert heard.result.sequence == 3


def _large(sequence: int) -> list[pb.ExchangeRequest]:
    """A reduction that travels in parts."""
    payload, parts = pack([np.arange(400_000.0)])
    terms = pb.PlainTerms(op="sum", arrays=["float64[400000]"], root=-1)
    contribution = pb.Contribution(
        sequence=sequence, generation=1, operation=pb.OPERATION_REDUCE, plain_terms=terms, payload=payload
    )
    return [pb.ExchangeRequest(contribution=contribution), *(pb.ExchangeRequest(part=part) for part in parts)]


@pytest.mark.fault
@pytest.mark.parametrize("closes", [True, False])
def test_half_a_request_is_forgotten_when_it_comes_on_the_stream(hand: _Hand, plug: _Plug, closes: bool) -> None:
    """From its begin; whether the service has heard before that the socket has ended, or has not."""
    plug.attach(hand.invitation.ticket)
    plug.send(_barrier(1))
    plug.hear()
    *most, last = _large(2)
    plug.send(*most)
    plug.socket.sendall(framed(last)[:-1])
    if closes:
        plug.close()
    for request in (*most, last):
        hand.requests.put(request)
    assert next(hand.responses).result.sequence == 2


def test_nothing_comes_between_the_parts_of_a_request(hand: _Hand, plug: _Plug) -> None:
    """On the socket as on the stream; how it ends is said there, and the socket ends with it."""
    plug.attach(hand.invitation.ticket)
    plug.send(*_large(1)[:-1], pb.ExchangeRequest(pull=pb.Pull()))
    code, text = hand.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a part here, received pull" in text
    assert plug.hear() is None


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


def test_a_ticket_ends_with_its_stream(serve: Callable[..., Any]) -> None:
    """There is nothing to attach to any more."""
    with closing(_Hand(serve().address, "goes")) as gone:
        invitation = gone.invitation
        gone.requests.put(pb.ExchangeRequest(leave=pb.Leave()))
        assert list(gone.responses) == []
        with closing(_Plug(invitation)) as late:
            assert late.attach(invitation.ticket) is None


@pytest.mark.fault
def test_an_answer_that_is_not_asked_for_again_comes_on_the_stream(serve: Callable[..., Any]) -> None:
    """A rank whose wait was interrupted has ended its socket, and hears the answer there."""
    address = serve().address
    with closing(_Hand(address, "two", 0, 2)) as one, closing(_Hand(address, "two", 1, 2)) as two:
        with closing(_Plug(one.invitation)) as mine:
            assert mine.attach(one.invitation.ticket) is not None
            mine.send(_barrier(1))
        with closing(_Plug(two.invitation)) as other:
            assert other.attach(two.invitation.ticket) is not None  # the service has seen that the first one ended
            other.send(_barrier(1))
            assert other.hear() is not None
        assert next(one.responses).result.sequence == 1


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


def test_a_socket_is_not_attached_on_a_stream(hand: _Hand) -> None:
    """The request has a meaning on local sockets alone."""
    hand.requests.put(pb.ExchangeRequest(attach=pb.Attach(ticket=hand.invitation.ticket)))
    code, text = hand.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "expected a request" in text
