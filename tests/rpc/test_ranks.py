"""Ranks as processes, and the errors that others get when one ends; and a service that can't be reached."""

import logging
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import MismatchError, PeerLostError, ServiceError
from bnworker import World
from bnworker.transports.service import ServiceTransport
from bnworker.transports.service.goodbye import GOODBYE_S
from support.ports import free_port

pytestmark = pytest.mark.rpc

_HOST = socket.gethostname()


def _world(address: str, rank: int, world_size: int, timeout: float = 60.0) -> World:
    return World(ServiceTransport(address, "job", rank, world_size, timeout=timeout), install=False)


# ---- ranks that go ----


@pytest.mark.fault
@pytest.mark.parametrize(
    "body", ["world.barrier(); world.barrier(); time.sleep(60)", "world.barrier(); time.sleep(60)"]
)
def test_kill_9_is_reported_within_a_second(serve: Callable[..., Any], run_rank: Callable[..., Any], body: str) -> None:
    """A rank that is killed while it waits, or while it computes: the others hear who it was and where they are."""
    service = serve()
    lost = run_rank(service.address, 2, 3, body)
    other = run_rank(service.address, 1, 3, "world.barrier(); world.barrier()")
    world = _world(service.address, 0, 3)
    assert (lost.line(), other.line()) == ("joined", "joined")
    world.barrier()
    begin = time.monotonic()
    lost.signal(signal.SIGKILL)
    reported = other.line()
    assert time.monotonic() - begin < 1.0
    with pytest.raises(PeerLostError) as caught:
        world.barrier()
    world.leave()
    who = f"rank 2 (host {_HOST}, pid {lost.popen.pid})"
    expected = f"{who} was lost: its connection broke without a goodbye (last seen "
    assert str(caught.value).startswith(expected)
    assert "barrier (number 1)" in str(caught.value)
    assert (caught.value.ranks, caught.value.layer, caught.value.step) == ((2,), None, 1)
    assert reported.startswith(f"PeerLostError [2] None 1 {expected}")


@pytest.mark.fault
def test_a_rank_that_computes_hears_of_it_at_its_next_call(
    serve: Callable[..., Any], run_rank: Callable[..., Any]
) -> None:
    """Nobody waits when the rank is lost; the error then names the exchange in which it is raised."""
    service = serve()
    lost = run_rank(service.address, 1, 2, "time.sleep(60)")
    world = _world(service.address, 0, 2)
    assert lost.line() == "joined"
    lost.end(signal.SIGKILL)
    _until_ended(world)
    with pytest.raises(PeerLostError, match="was lost") as caught:
        world.allreduce([np.ones(2)])
    assert (caught.value.ranks, caught.value.step) == ((1,), 0)
    world.leave()


def test_hanging_up_is_no_goodbye(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """A client that ends its requests, but not its process, is let go by the service, and comes back."""
    service = serve()
    body = (
        "client = world._transport._client\n"
        "connection = client._connection\n"
        "connection.stream._requests.put(None)\n"
        "while client._connection is connection: time.sleep(0.01)  # until the service has let it go\n"
        "world.barrier()"
    )
    rude = run_rank(service.address, 1, 2, body)
    with _world(service.address, 0, 2) as world:
        assert rude.line() == "joined"
        world.barrier()
        assert rude.line() == "left"


def test_a_rank_that_fails_says_what_of(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """The reason travels: a ValueError on one rank is read on all."""
    service = serve()
    failing = run_rank(service.address, 1, 2, "with world:\n    raise ValueError('no such file')")
    with _world(service.address, 0, 2) as world:
        with pytest.raises(PeerLostError) as caught:
            world.barrier()
        text = f"rank 1 (host {_HOST}, pid {failing.popen.pid}) failed with ValueError: no such file. rank 0 "
        assert str(caught.value).startswith(text)


def test_a_long_reason_is_cut(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """It arrives, with how long it was."""
    service = serve()
    run_rank(service.address, 1, 2, "world._transport.leave('failed with ' + 'ä' * 100_000)")
    with _world(service.address, 0, 2) as world:
        with pytest.raises(PeerLostError) as caught:
            world.barrier()
        assert "failed with " + "ä" * 1_988 + "… (100012 characters)" in str(caught.value)


def test_ctrl_c_ends_a_rank_that_waits(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """The interrupt reaches the thread that waits; the others hear of it, and nothing hangs."""
    service = serve()
    interrupted = run_rank(service.address, 1, 2, "with world:\n    say('waits')\n    world.barrier()")
    with _world(service.address, 0, 2) as world:
        assert (interrupted.line(), interrupted.line()) == ("joined", "waits")
        code, _, err = interrupted.end(signal.SIGINT, within=150)
        assert "KeyboardInterrupt" in err
        assert code != 0
        with pytest.raises(PeerLostError, match="failed with KeyboardInterrupt"):
            world.barrier()


def test_leaving_is_quick(serve: Callable[..., Any]) -> None:
    """Cleanly, after an error, and twice."""
    service = serve()
    worlds = [_world(service.address, 0, 1)]
    begin = time.monotonic()
    worlds[0].leave()
    worlds[0].leave()
    assert time.monotonic() - begin < GOODBYE_S
    broken = _world(service.address, 0, 1)
    service.end(signal.SIGKILL)
    with pytest.raises(ServiceError):
        broken.barrier()
    begin = time.monotonic()
    broken.leave()
    assert time.monotonic() - begin < GOODBYE_S


# ---- deadlines ----


def test_an_exchange_ends_by_its_deadline(serve: Callable[..., Any]) -> None:
    """A silent rank is named after `timeout`, by the service."""
    service = serve()
    with futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(_world, service.address, 1, 2)
        world, silent = _world(service.address, 0, 2, timeout=1.0), joining.result(150)
    begin = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        world.barrier()
    assert 1.0 <= time.monotonic() - begin < 3.0
    assert caught.value.ranks == (1,)
    assert "did not take part within 1 s, last seen joining; rank 0" in str(caught.value)
    world.leave()
    silent.leave()


def test_joining_ends_by_its_deadline(serve: Callable[..., Any]) -> None:
    """A rank that never comes is named."""
    service = serve()
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"Rank 1 of 2 did not join in time; rank 0 \(host .*\) waited\.") as caught:
        _world(service.address, 0, 2, timeout=1.0)
    assert time.monotonic() - begin < 3.0
    assert caught.value.ranks == (1,)


@pytest.mark.fault
def test_a_frozen_service_is_noticed_by_the_deadline(serve: Callable[..., Any]) -> None:
    """The rank itself watches the time: a service that can't speak can't tell."""
    service = serve()
    world = _world(service.address, 0, 1, timeout=1.0)
    service.signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ServiceError, match=r"did not answer within 1 s\. It may be frozen or cut off"):
        world.barrier()
    assert time.monotonic() - begin < 4.0
    service.signal(signal.SIGCONT)
    world.leave()


# ---- a service that is not there ----


@pytest.mark.fault
def test_a_service_that_dies_is_reported_at_once(serve: Callable[..., Any]) -> None:
    """kill -9 of the service, while a rank waits and while it doesn't."""
    service = serve()
    world = _world(service.address, 0, 1)
    service.end(signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        world.barrier()
    assert time.monotonic() - begin < 2.0
    assert str(caught.value).startswith(f"The connection to the service at {service.address} broke, and could not be ")
    assert "made anew within 0.5 s (UNAVAILABLE: " in str(caught.value)
    assert str(caught.value).endswith("Look at the service's log; once it is back, start the job again.")
    world.leave()


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    """The rank tries for as long as it may, says so in the log, and then names the address and what to do."""
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "bnworker"), pytest.raises(ServiceError) as caught:
        _world(address, 0, 1, timeout=4.0)
    assert 4.0 <= time.monotonic() - begin < 8.0
    assert str(caught.value) == (
        f"No statistics service could be reached at {address} within 4 s. Check the address, and that the service "
        "runs there (bnlayer serve --listen HOST:PORT)."
    )
    assert caplog.messages == [
        f"nobody listens at {address} yet; trying until 4 s have passed (timeout=)",
    ]


def test_a_service_that_comes_late_is_found(start: Callable[..., Any]) -> None:
    """Ranks and their daemon are often started together."""
    address = f"127.0.0.1:{free_port()}"
    with futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(_world, address, 0, 1, 60.0)
        service = start("-m", "bnserver", "--listen", address)
        assert service.line() == f"bnserver listening on {address}"
        world = joining.result(150)
    world.barrier()
    world.leave()


def test_another_grpc_server_is_no_statistics_service() -> None:
    """A wrong port is told as one."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ServiceError, match=f"What listens at 127.0.0.1:{port} is no statistics service"):
            _world(f"127.0.0.1:{port}", 0, 1, timeout=60.0)
    finally:
        server.stop(None).wait()


# ---- refusals ----


def test_a_taken_rank_is_refused(serve: Callable[..., Any]) -> None:
    """Two processes with one rank: the second hears who the first is, the first notices nothing."""
    service = serve()
    with _world(service.address, 0, 1) as world:
        with pytest.raises(
            MismatchError, match=rf"rank 0 \(host {re.escape(_HOST)}, pid \d+\) is there already"
        ) as caught:
            _world(service.address, 0, 1)
        assert caught.value.ranks == (0,)
        world.barrier()


def test_another_world_size_is_refused(serve: Callable[..., Any]) -> None:
    """Both numbers are named."""
    service = serve()
    with _world(service.address, 0, 1), pytest.raises(MismatchError, match=r"with world size 2, but rank 0 .* with 1"):
        _world(service.address, 1, 2)


# ---- size ----


def test_arrays_beyond_a_message_travel_in_parts(serve: Callable[..., Any]) -> None:
    """Reductions and broadcasts of more than gRPC's 4 MiB; and the exact bytes come back."""
    service = serve()
    big = np.random.default_rng(0).normal(size=1_300_001)
    integers = np.arange(7, dtype=np.int16)

    def rank(number: int) -> tuple[bytes, bytes, bytes]:
        with _world(service.address, number, 2) as world:
            total, small = world.allreduce([big * (number + 1), integers])
            (sent,) = world.broadcast([big] if number == 1 else [np.zeros(1)], root=1)
            return total.tobytes(), small.tobytes(), sent.tobytes()

    with futures.ThreadPoolExecutor(2) as pool:
        got = [pool.submit(rank, number) for number in range(2)]
        for one in got:
            assert one.result(150) == ((big + big * 2).tobytes(), (integers * 2).tobytes(), big.tobytes())


def _until_ended(world: World) -> None:
    """Wait until the rank's stream has ended: it hears of it without asking."""
    world._transport._client._thread.join(150)  # type: ignore[attr-defined]  # below the surface: nothing else waits here
    assert not world._transport._client._thread.is_alive()  # type: ignore[attr-defined]  # likewise
