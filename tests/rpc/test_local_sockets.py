"""A rank's way around gRPC on one machine: when it is taken, and what happens when it ends."""

import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization, CollectiveError, PeerLostError, ServiceError
from bnproto.v1 import statistics_pb2 as pb
from bnworker import World
from bnworker.transports.service import ServiceTransport, local_channel
from bnworker.transports.service.client import _TURN_S, Client, Connection
from bnworker.transports.service.local_channel import LocalChannel
from support.fault.faults import HEALTHY
from support.fault.proxy import proxy

pytestmark = pytest.mark.rpc

_LIMIT_S = 60.0


def _joined(address: str, rank: int = 0, world_size: int = 1, *, local_socket: bool = True) -> tuple[World, Client]:
    transport = ServiceTransport(address, "job", rank, world_size, timeout=_LIMIT_S, local_socket=local_socket)
    return World(transport, install=False), transport._client


def _connection(client: Client) -> Connection:
    assert client._connection is not None
    return client._connection


def _local(client: Client) -> LocalChannel:
    """The channel of a rank that has a local socket."""
    channel = _connection(client).channel
    assert isinstance(channel, LocalChannel)
    return channel


def _is_local(client: Client) -> bool:
    return isinstance(_connection(client).channel, LocalChannel)


def _both(address: str) -> list[tuple[World, Client]]:
    with futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: _joined(address, rank, 2), range(2)))


# ---- when it is taken ----


def test_it_is_taken_on_one_machine(serve: Callable[..., Any]) -> None:
    """By itself; exchanges then go over it alone."""
    world, client = _joined(serve().address)
    with world:
        assert _is_local(client)
        (total,) = world.allreduce([np.arange(5.0)])
        assert total.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert _connection(client).stream._answers.empty()
        assert _connection(client).stream._requests.empty()
        assert _is_local(client)


def test_it_can_be_turned_off(serve: Callable[..., Any]) -> None:
    """Everything then goes over the stream."""
    world, client = _joined(serve().address, local_socket=False)
    with world:
        assert not _is_local(client)
        world.barrier()
        assert not _is_local(client)


def test_whoever_comes_through_something_in_between_stays_on_the_stream(serve: Callable[..., Any]) -> None:
    """A tunnel or a proxy stands there for a reason."""
    with proxy(serve().address, 1, lambda rank, number: HEALTHY) as between:
        world, client = _joined(between.addresses[0])
        with world:
            world.barrier()
            assert not _is_local(client)


def test_where_nobody_listens_the_stream_does(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another network namespace, which can't see the socket's name."""
    original = local_channel.LocalChannel

    def elsewhere(invitation: pb.LocalSocket, *others: Any) -> LocalChannel:
        return original(pb.LocalSocket(name="nobody", ticket=invitation.ticket), *others)

    monkeypatch.setattr(local_channel, "LocalChannel", elsewhere)
    world, client = _joined(serve().address)
    with world:
        assert not _is_local(client)
        world.barrier()


def test_another_service_is_not_taken_for_this_one(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot id says which run of the service answers."""
    original = local_channel.LocalChannel
    monkeypatch.setattr(
        local_channel, "LocalChannel", lambda invitation, boot_id, timeout: original(invitation, boot_id + 1, timeout)
    )
    world, client = _joined(serve().address)
    with world:
        world.barrier()
        assert not _is_local(client)


def test_a_service_that_is_back_invites_again(serve: Callable[..., Any], tmp_path: Any) -> None:
    """After kill -9 and a restart, the next connection has a local socket, too."""
    service = serve("--state-dir", str(tmp_path))
    world, client = _joined(service.address)
    with world:
        world.barrier()
        service.end(signal.SIGKILL)
        serve("--listen", service.address, "--state-dir", str(tmp_path))
        world.barrier()
        world.barrier()
        assert _is_local(client)


# ---- when it ends ----


@pytest.mark.fault
def test_a_socket_that_ends_under_a_rank_that_waits_is_made_anew(serve: Callable[..., Any]) -> None:
    """With its stream; the job goes on, and counts everything once."""
    (one, client), (two, _) = _both(serve("--away=10").address)
    layers = [BatchNormalization(synchronized=True, name="a", collective=world) for world in (one, two)]
    x = np.ones((4, 3), np.float32)
    with futures.ThreadPoolExecutor(2) as pool:

        def both(*calls: Callable[[], Any]) -> list[Any]:
            return [future.result(_LIMIT_S) for future in [pool.submit(call) for call in calls]]

        both(lambda: layers[0](x, training=True), lambda: layers[1](x, training=True))
        mine = _local(client)
        waits = pool.submit(lambda: layers[0](x, training=True))
        while not mine._receiving.locked():  # it has asked, and waits
            assert not waits.done()
        mine.close()
        layers[1](x, training=True)
        waits.result(_LIMIT_S)
        assert _is_local(client)
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
    world, client = _joined(serve("--away=10").address)
    with world:
        mine = _local(client)
        receive = mine.receive

        def lost(timeout: float) -> None:
            assert receive(timeout) is not None
            raise ConnectionResetError

        monkeypatch.setattr(mine, "receive", lost)
        (total,) = world.allreduce([np.arange(3)])
        assert total.tolist() == [0, 1, 2]
        world.barrier()
        assert _is_local(client)


@pytest.mark.fault
def test_what_can_not_be_sent_is_said_again(serve: Callable[..., Any]) -> None:
    """A socket that ended between two exchanges is noticed when the next one is sent."""
    world, client = _joined(serve("--away=10").address)
    with world:
        _local(client)._socket.shutdown(socket.SHUT_RDWR)
        big = np.arange(400_000.0)  # travels in parts
        (total,) = world.allreduce([big])
        assert np.array_equal(total, big)
        world.barrier()
        assert _is_local(client)


@pytest.mark.fault
def test_a_large_contribution_is_repeated_whole_after_a_cut(serve: Callable[..., Any]) -> None:
    """Its parts came on the stream, while what follows them came on the socket: each broke the other off."""
    world, client = _joined(serve("--away=10").address)
    with world:
        for step in range(10):
            (total,) = world.allreduce([np.full(2_000_000, float(step))])
            assert total[-1] == step
            _connection(client).cut()
            (total,) = world.allreduce([np.full(3, float(step))])
            assert total.tolist() == [step] * 3


@pytest.mark.fault
def test_an_interrupt_ends_its_use(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received when Ctrl-C came may be lost: the goodbye goes on the stream, with its reason."""
    (one, client), (two, _) = _both(serve().address)
    mine = _local(client)

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mine, "receive", interrupted)
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
    world, client = _joined(service.address, local_socket=local_socket)
    main = threading.get_ident()
    within, over = threading.Event(), threading.Event()

    def leave(*_: object) -> None:
        within.set()
        world.leave()

    def interrupt() -> None:
        while sys._current_frames()[main].f_code.co_name not in ("receive", "_take_turn", "send"):
            if over.is_set():
                return
        signal.pthread_kill(main, signal.SIGUSR1)
        assert within.wait(_LIMIT_S)
        over.wait(2 * _TURN_S)  # the handler is to outlast the wait that it came into
        service.signal(signal.SIGCONT)

    before = signal.signal(signal.SIGUSR1, leave)
    service.signal(signal.SIGSTOP)  # so that the rank waits for it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(ServiceError, match="has left its job"):
            world.allreduce([np.zeros(size)])
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert not client._thread.is_alive()


@pytest.mark.fault
def test_a_signal_handler_may_leave_while_something_changes(serve: Callable[..., Any]) -> None:
    """The thread that it came into holds the lock, and goes on only after it."""
    world, client = _joined(serve().address)
    with client._lock:
        world.leave()
    client._thread.join(_LIMIT_S)
    assert not client._thread.is_alive()


@pytest.mark.fault
def test_a_forked_child_does_not_speak_for_its_rank(serve: Callable[..., Any]) -> None:
    """The parent took the answer to the child's question for that to its own."""
    world, client = _joined(serve().address)
    with world:
        world.barrier()
        connection = client._connection
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads beside a fork: that is the point
            child = os.fork()
        if child == 0:
            reported = b"nothing"
            try:
                world.allreduce([np.array([1000])])
            except CollectiveError as error:
                reported = str(error).encode()
            finally:
                os.write(writing, reported)
                os._exit(0)
        os.waitpid(child, 0)
        assert f"Process {child} was forked from rank 0" in os.read(reading, 1000).decode()
        os.close(reading)
        os.close(writing)
        (total,) = world.allreduce([np.array([1])])
        assert total.tolist() == [1]
        assert client._connection is connection  # the child has not ended it either


def test_a_timeout_beyond_any_clock_is_a_long_one(serve: Callable[..., Any]) -> None:
    """Nobody waits for 300 years, but nothing fails of it."""
    transport = ServiceTransport(serve().address, "job", 0, 1, timeout=1e10)
    with World(transport, install=False) as world:
        assert _is_local(transport._client)
        world.barrier()
