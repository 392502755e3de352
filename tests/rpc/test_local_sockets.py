"""The way around gRPC on one machine: when it is taken, what happens when it ends, and who is shown out."""

import os
import queue
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import BatchNormalization, PeerLostError, ServiceError
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
        assert stream.is_local
        (total,) = world.allreduce([np.arange(5.0)])
        assert total.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert stream._connection is not None
        assert stream._connection.requests.empty()
        assert stream.is_local


def test_it_can_be_turned_off(serve: Callable[..., Any]) -> None:
    """Everything then goes over the stream."""
    world, stream = _joined(serve().address, local_socket=False)
    with world:
        assert not stream.is_local
        world.barrier()
        assert not stream.is_local


def test_whoever_comes_through_something_in_between_stays_on_the_stream(serve: Callable[..., Any]) -> None:
    """A tunnel or a proxy stands there for a reason."""
    with proxy(serve().address, 1, lambda rank, number: HEALTHY) as between:
        world, stream = _joined(between.addresses[0])
        with world:
            world.barrier()
            assert not stream.is_local


def test_where_nobody_listens_the_stream_does(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another network namespace, which can't see the socket's name."""
    original = local.LocalSocket

    def elsewhere(invitation: pb.LocalSocket, boot_id: int) -> local.LocalSocket:
        return original(pb.LocalSocket(name="nobody", ticket=invitation.ticket), boot_id)

    monkeypatch.setattr(local, "LocalSocket", elsewhere)
    world, stream = _joined(serve().address)
    with world:
        assert not stream.is_local
        world.barrier()


def test_another_service_is_not_taken_for_this_one(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot id says which run of the service answers."""
    original = local.LocalSocket
    monkeypatch.setattr(local, "LocalSocket", lambda invitation, boot_id: original(invitation, boot_id + 1))
    world, stream = _joined(serve().address)
    with world:
        world.barrier()
        assert not stream.is_local


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
        assert stream.is_local


# ---- when it ends ----


@pytest.mark.fault
def test_a_socket_that_ends_under_a_rank_that_waits_is_made_anew(serve: Callable[..., Any]) -> None:
    """With its stream; the job goes on, and counts everything once."""
    (one, stream), (two, _) = _both(serve("--away=10").address)
    layers = [BatchNormalization(synchronized=True, name="a", collective=world) for world in (one, two)]
    x = np.ones((4, 3), np.float32)
    with futures.ThreadPoolExecutor(2) as pool:

        def both(*calls: Callable[[], Any]) -> list[Any]:
            return [future.result(_LIMIT_S) for future in [pool.submit(call) for call in calls]]

        both(lambda: layers[0](x, training=True), lambda: layers[1](x, training=True))
        assert stream._connection is not None
        mine = stream._connection.socket
        assert mine is not None
        waits = pool.submit(lambda: layers[0](x, training=True))
        while not stream.memory.asked:
            assert not waits.done()
        mine.end()
        layers[1](x, training=True)
        waits.result(_LIMIT_S)
        assert stream.is_local
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
        mine = stream._connection.socket
        assert mine is not None
        hear = mine.hear

        def lost(timeout: float) -> None:
            assert hear(timeout) is not None
            raise ConnectionResetError

        monkeypatch.setattr(mine, "hear", lost)
        (total,) = world.allreduce([np.arange(3)])
        assert total.tolist() == [0, 1, 2]
        world.barrier()
        assert stream.is_local


@pytest.mark.fault
def test_what_can_not_be_sent_is_said_again(serve: Callable[..., Any]) -> None:
    """A socket that ended between two exchanges is noticed when the next one is sent."""
    world, stream = _joined(serve("--away=10").address)
    with world:
        assert stream._connection is not None
        assert stream._connection.socket is not None
        stream._connection.socket._socket.shutdown(socket.SHUT_RDWR)
        big = np.arange(400_000.0)  # travels in parts
        (total,) = world.allreduce([big])
        assert np.array_equal(total, big)
        world.barrier()
        assert stream.is_local


@pytest.mark.fault
def test_a_large_contribution_is_repeated_whole_after_a_cut(serve: Callable[..., Any]) -> None:
    """Its parts came on the stream, while what follows them came on the socket: each broke the other off."""
    world, stream = _joined(serve("--away=10").address)
    with world:
        for step in range(10):
            (total,) = world.allreduce([np.full(2_000_000, float(step))])
            assert total[-1] == step
            assert stream._connection is not None
            stream._connection.cut()
            (total,) = world.allreduce([np.full(3, float(step))])
            assert total.tolist() == [step] * 3


@pytest.mark.fault
@pytest.mark.parametrize("moment", ["the next connection asks again", "the answer counts first"])
def test_an_answer_in_hand_when_the_connection_ends_counts_once(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Answers to pulls carry no number: the second one was taken for that to the next pull, of another layer."""
    world, stream = _joined(serve("--away=10").address)
    with world:
        layers = [BatchNormalization(synchronized=True, name=f"l{n}", collective=world) for n in (3, 4)]
        for layer, channels in zip(layers, (3, 4), strict=True):
            layer(np.ones((2, channels), np.float32), training=True)
        connection = stream._connection
        assert connection is not None
        mine = connection.socket
        assert mine is not None
        hear = mine.hear

        def cut(timeout: float) -> Any:
            answer = hear(timeout)
            if answer is not None:
                connection.cut()
                while moment.startswith("the next") and (
                    stream._connection in (None, connection) or not stream.is_local
                ):
                    threading.Event().wait(0.001)
            return answer

        monkeypatch.setattr(mine, "hear", cut)
        for _ in range(3):
            for layer in layers:
                state = world.pull(layer.name)
                assert state is not None
                assert state.channels == layer.state.channels
        world.barrier()


@pytest.mark.fault
def test_an_interrupt_ends_its_use(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received when Ctrl-C came may be lost: the goodbye goes on the stream, with its reason."""
    (one, stream), (two, _) = _both(serve().address)
    assert stream._connection is not None
    mine = stream._connection.socket
    assert mine is not None

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine, "hear", interrupted)
    with pytest.raises(KeyboardInterrupt), one:
        one.barrier()
    assert mine._socket.fileno() == -1
    with pytest.raises(PeerLostError, match="failed with KeyboardInterrupt"):
        two.barrier()
    two.leave()


@pytest.mark.fault
@pytest.mark.parametrize("local_socket", [True, False], ids=["local", "stream"])
@pytest.mark.parametrize("size", [3, 2_000_000])
def test_a_signal_handler_may_leave(serve: Callable[..., Any], local_socket: bool, size: int) -> None:
    """In the middle of a wait, or of sending: it waited for a lock that its own thread held, for ever."""
    service = serve()
    world, stream = _joined(service.address, local_socket=local_socket)
    left = threading.Event()

    def leave(*_: object) -> None:
        world.leave()
        left.set()

    before = signal.signal(signal.SIGUSR1, leave)
    # The service sleeps meanwhile, so this rank waits for it when the signal comes.
    timers = [
        threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)),
        threading.Timer(0.6, lambda: service.signal(signal.SIGCONT)),
    ]
    service.signal(signal.SIGSTOP)
    try:
        for timer in timers:
            timer.start()
        with pytest.raises(ServiceError, match="has left its job"):
            world.allreduce([np.zeros(size)])
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert left.is_set()
    assert not stream._thread.is_alive()


@pytest.mark.fault
def test_a_forked_child_does_not_speak_for_its_rank(serve: Callable[..., Any]) -> None:
    """The parent took the answer to the child's question for that to its own."""
    world, stream = _joined(serve().address)
    with world:
        world.barrier()
        connection = stream._connection
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads beside a fork: that is the point
            child = os.fork()
        if child == 0:
            told = b"nothing"
            try:
                world.allreduce([np.array([1000])])
            except ServiceError as error:
                told = str(error).encode()
            finally:
                os.write(writing, told)
                os._exit(0)
        os.waitpid(child, 0)
        assert f"Process {child} was forked from rank 0" in os.read(reading, 1000).decode()
        os.close(reading)
        os.close(writing)
        (total,) = world.allreduce([np.array([1])])
        assert total.tolist() == [1]
        assert stream._connection is connection  # the child has not ended it either


def test_a_timeout_beyond_any_clock_is_a_long_one(serve: Callable[..., Any]) -> None:
    """Nobody waits for 300 years, but nothing fails of it."""
    transport = ServiceTransport(serve().address, "job", 0, 1, timeout=1e10)
    with World(transport, install=False) as world:
        assert transport._stream.is_local
        world.barrier()


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
    terms = pb.PlainTerms(op="sum", arrays=["float64[400000]"], root=-1)
    contribution = pb.Contribution(
        sequence=sequence, generation=1, operation=pb.OPERATION_REDUCE, plain_terms=terms, payload=payload
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
