"""Cuts, kills and freezes with real processes: what recovers, which ranks get an error, and within what time."""

import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization, PeerLostError, ServiceError
from bnworker import World
from bnworker.transports.service import ServiceTransport, local_channel, transport
from bnworker.transports.service.client import Client
from support.breaker import Breaker
from support.ports import free_port
from support.service import daemon

pytestmark = [pytest.mark.rpc, pytest.mark.fault]

_HOST = socket.gethostname()
_RANKS = 3
_LAYERS = 5
_LARGE = 300_000  # numbers of a reduction that travels in parts
_LIMIT_S = 150.0  # for a job; only ends a test that hangs
_ENOUGH = 10  # faults: with fewer the test does not test
_AWAY = "--away=10"  # where coming back in time is not what is tested: by itself a service waits for half a second
_SLACK_S = 1.0  # for a machine that does other things


def _world(address: str, rank: int, world_size: int, timeout: float = 60.0) -> World:
    return World(ServiceTransport(address, "job", rank, world_size, timeout=timeout), install=False)


def _train(address: str, rank: int, steps: int, done: Callable[[int, int], None] = lambda rank, step: None) -> Any:
    """A job of five layers, forward and backward, with a reduction; returns the final statistics and versions."""
    rng = np.random.default_rng(rank)
    with _world(address, rank, _RANKS) as world:
        layers = [BatchNormalization(synchronized=True, name=f"l{n}", collective=world) for n in range(_LAYERS)]
        for step in range(steps):
            x = rng.normal(size=(4, 3)).astype(np.float32) * (1 + step % 7)
            for layer in layers:
                x = layer(x, training=True)
            for layer in reversed(layers):
                layer.backward(x)
            (total,) = world.allreduce([np.array([rank + step])])
            assert total.tolist() == [3 + 3 * step]
            if step % 5 == 4:
                (total,) = world.allreduce([np.full(_LARGE, rank + step)])
                assert (total == 3 + 3 * step).all()
                layer = layers[step % _LAYERS]
                assert _bits(layer) == _arrays(world.pull(layer.name))
            done(rank, step)
        for layer in layers:
            before = layer.state
            world.pull(layer)
            assert _bits(layer) == [array.tobytes() for array in before.arrays().values()]
        return [_bits(layer) for layer in layers]


def _bits(layer: BatchNormalization) -> list[bytes]:
    return _arrays(layer.state)


def _arrays(state: Any) -> list[bytes]:
    return [array.tobytes() for array in state.arrays().values()]


def _job(address: str, steps: int, done: Callable[[int, int], None] = lambda rank, step: None) -> Any:
    """All ranks, as threads; returns the statistics that all of them end with."""
    with futures.ThreadPoolExecutor(_RANKS) as pool:
        ranks = [pool.submit(_train, address, rank, steps, done) for rank in range(_RANKS)]
        first, *others = [rank.result(_LIMIT_S) for rank in ranks]
    assert all(other == first for other in others)
    return first


@cache
def _undisturbed(steps: int) -> Any:
    """What all ranks end with where nothing happens: it depends on the number of steps alone."""
    with daemon() as address:
        return _job(address, steps)


@contextmanager
def _proxy(target: str) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A TCP proxy: its address, what cuts every connection through it, and what lets nothing through any more."""
    host, _, port = target.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    pairs: list[socket.socket] = []
    closing = ExitStack()
    swallowed: set[socket.socket] = set()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if source not in swallowed:
                    sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                pairs.extend((closing.enter_context(near), closing.enter_context(far)))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    def cut() -> None:
        for end in pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        pairs.clear()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}", cut, lambda: swallowed.update(pairs)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        cut()
        closing.close()


def _forever(action: Callable[[], object]) -> None:
    while True:
        action()


# ---- what heals ----


@pytest.mark.parametrize("seed", range(2))
def test_local_sockets_and_connections_that_end_at_any_moment_change_nothing(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Of a rank that sends, waits or computes; a connection made anew has a local socket again, which ends as well."""
    breaker = Breaker(seed)

    def kept(*arguments: Any, **options: Any) -> Client:
        breaker.clients.append(Client(*arguments, **options))
        return breaker.clients[-1]

    monkeypatch.setattr(transport, "Client", kept)
    monkeypatch.setattr(local_channel, "LocalChannel", breaker.channel)
    with closing(breaker):
        disturbed = _job(serve(_AWAY).address, 25)
    assert disturbed == _undisturbed(25)
    assert min(breaker.ended.values()) >= _ENOUGH, breaker.ended


def test_cut_connections_heal(serve: Callable[..., Any]) -> None:
    """Every connection is cut, again and again, in the middle of things: the bits of an undisturbed run."""
    service = serve(_AWAY)
    with _proxy(service.address) as (address, cut, _):

        def done(rank: int, step: int) -> None:
            if rank == 0 and step % 4 == 3:
                cut()

        got = _job(address, 20, done)
    assert got == _undisturbed(20)


def test_a_connection_that_lets_nothing_through_is_made_anew(serve: Callable[..., Any]) -> None:
    """Nobody closes it, so only heartbeats without an answer tell; it heals before the lease is over."""
    service = serve("--lease", "2", _AWAY)
    with _proxy(service.address) as (address, _, swallow):

        def done(rank: int, step: int) -> None:
            if (rank, step) == (0, 3):
                swallow()

        begin = time.monotonic()
        got = _job(address, 6, done)
        assert time.monotonic() - begin < 2.0 + 4 * _SLACK_S  # long before the timeout of 60 s
    assert got == _undisturbed(6)


def test_the_service_is_killed_and_the_job_goes_on(
    start: Callable[..., Any], serve: Callable[..., Any], tmp_path: Path
) -> None:
    """kill -9 in the middle of things, four times: nothing lost, nothing counted twice."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("-m", "bnserver", "--listen", address, "--state-dir", str(tmp_path), _AWAY)
    daemons = [start(*flags)]
    assert daemons[0].line() == f"bnserver listening on {address}"
    resumed: list[float] = []
    began = threading.Event()

    def done(rank: int, step: int) -> None:
        if rank == 0 and began.is_set():
            began.clear()
            resumed.append(time.monotonic())
        if rank == 0 and step % 5 == 2 and len(daemons) < 5:
            daemons[-1].end(signal.SIGKILL)
            daemons.append(start(*flags))
            assert daemons[-1].line() == f"bnserver listening on {address}"
            resumed.append(-time.monotonic())
            began.set()

    got = _job(address, 30, done)
    assert len(daemons) == 5
    assert max(np.add.reduceat(resumed, range(0, len(resumed), 2))) < 2.0 + _SLACK_S
    assert got == _undisturbed(30)


@pytest.mark.parametrize(
    "failpoint",
    [
        "before-event=kill:40",
        "before-journal=kill:23",
        "in-journal=kill:24",
        "after-journal=kill:25",
        "before-reply=drop:50",
        "after-reply=kill:51",
        "after-reply=kill:70",
        "in-snapshot=kill:1",
        "before-rename=kill:1",
        "after-rename=kill:1",
    ],
)
def test_the_service_dies_at_a_named_point(
    start: Callable[..., Any],
    serve: Callable[..., Any],
    tmp_path: Path,
    failpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, within and after each thing it does; started again, it goes on, and all is as if nothing had been."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("-m", "bnserver", "--listen", address, "--state-dir", str(tmp_path), _AWAY)
    monkeypatch.setenv("BNSERVER_FAILPOINTS", failpoint)
    dying = start(*flags)
    assert dying.line() == f"bnserver listening on {address}"
    monkeypatch.delenv("BNSERVER_FAILPOINTS")

    def bury() -> None:
        if "drop" in failpoint:
            return
        assert dying.popen.wait(150) == -signal.SIGKILL
        assert start(*flags).line() == f"bnserver listening on {address}"

    undertaker = threading.Thread(target=bury, daemon=True)
    undertaker.start()
    got = _job(address, 6)
    undertaker.join(150)
    assert not undertaker.is_alive()
    assert got == _undisturbed(6)


def test_a_service_that_slept_counts_it_against_nobody(serve: Callable[..., Any]) -> None:
    """It was stopped for longer than a lease: nobody is lost when it wakes."""
    service = serve("--lease", "1.5", _AWAY)
    with futures.ThreadPoolExecutor(1) as pool:
        joining = pool.submit(_world, service.address, 1, 2)
        with _world(service.address, 0, 2) as world, joining.result(150) as other:
            waiting = pool.submit(other.barrier)
            service.signal(signal.SIGSTOP)
            time.sleep(2.5)  # that is the length of the stop, not a wait for something
            service.signal(signal.SIGCONT)
            world.barrier()
            waiting.result(150)


# ---- who is told ----


@pytest.mark.parametrize("parked", [True, False])
def test_a_frozen_rank_is_reported_within_its_lease(
    serve: Callable[..., Any], run_rank: Callable[..., Any], parked: bool
) -> None:
    """SIGSTOP keeps the connection: only the silence tells. Everybody hears who, and where it was last seen.

    An exchange that it is parked in completes, if it has spoken: it is missed in the next one.
    """
    lease = 1.5
    service = serve("--lease", str(lease))
    trains = "layer(np.ones((2, 3), np.float32), training=True)"
    body = f"layer = BatchNormalization(synchronized=True, name='a', collective=world)\n{trains}\nsay('trained')\n"
    frozen = run_rank(service.address, 2, 3, body + (trains if parked else "time.sleep(60)"))
    other = run_rank(service.address, 1, 3, body + f"while True: {trains}")
    world = _world(service.address, 0, 3)
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    layer(np.ones((2, 3), np.float32), training=True)
    for process in (frozen, other):
        assert (process.line(), process.line()) == ("joined", "trained")
    frozen.signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        _forever(lambda: layer(np.ones((2, 3), np.float32), training=True))
    reported = other.line()
    assert time.monotonic() - begin < lease + 1.0 + _SLACK_S
    step = caught.value.step
    who = f"rank 2 (host {_HOST}, pid {frozen.popen.pid})"
    why = f"{who} was lost: it froze or was cut off, without a sign of life for 1.5 s (last seen "
    assert str(caught.value).startswith(why)
    assert "layer 'a' (forward, step " in str(caught.value)
    assert reported.startswith(f"PeerLostError [2] a {step} {why}")
    assert (caught.value.ranks, caught.value.layer) == ((2,), "a")
    assert step in ((1, 2) if parked else (1,))
    world.leave()


def test_a_rank_that_computes_is_not_dead(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """For longer than a lease, without a word on its stream."""
    service = serve("--lease", "1")
    busy = run_rank(service.address, 1, 2, "time.sleep(2.5)\nworld.barrier()")
    with _world(service.address, 0, 2) as world:
        assert busy.line() == "joined"
        world.barrier()
        assert busy.line() == "left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold", "between", "holds"), [(3_000_000, "world.barrier()", 3), (1_200_000, "time.sleep(0)", 6)]
)
def test_a_rank_that_holds_the_gil_is_not_dead(
    serve: Callable[..., Any], run_rank: Callable[..., Any], hold: int, between: str, holds: int
) -> None:
    """Python's lock is held for seconds, again and again: a straggler, by name, and no more.

    A gap of `sleep(0)` may be over before the heart's thread has its turn: one in four is enough for the lease of 5 s.
    """
    service = serve()
    code = (
        "import ctypes\n"
        "hold = ctypes.PyDLL(None).usleep\n"
        f"for _ in range({holds}):\n"
        f"    hold({hold})\n"
        f"    {between}\n"
        "world.barrier()"
    )
    busy = run_rank(service.address, 1, 2, code)
    with _world(service.address, 0, 2) as world:
        assert busy.line() == "joined"
        for _ in range(holds if "barrier" in between else 0):
            world.barrier()
        world.barrier()
        assert busy.line() == "left"
    _, _, log = service.end(signal.SIGTERM)
    straggler = rf"job 'job': rank 1 \(host {re.escape(_HOST)}, pid {busy.popen.pid}\), last seen .*, keeps 1 other"
    assert re.search(straggler + r" waiting for 2\.\d s", log)


_HELD_UP = """
import ctypes, os, threading
from bnworker.transports.service.heartbeat import Heartbeat
hold, send, over = ctypes.PyDLL(None).usleep, Heartbeat._send, threading.Event()
def sends(self):
    before = self._last
    os.kill(PID, 19)
    send(self)
    if self._last == before:
        return os.kill(PID, 18)
    Heartbeat._send = send
    os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 2.7; kill -CONT PID"], os.environ)
    over.set()
    hold(3_000_000)
Heartbeat._send = sends
over.wait()
time.sleep(0.005)
hold(3_000_000)
world.barrier()
"""


@pytest.mark.slow
def test_a_rank_that_was_held_up_keeps_its_connection(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """No heartbeat was answered for half a lease; it could not come back within `--away`, as it is held up again."""
    service = serve()
    rank = run_rank(service.address, 0, 1, _HELD_UP.replace("PID", str(service.popen.pid)))
    assert (rank.line(), rank.line()) == ("joined", "left"), rank.end()


def test_a_service_without_its_state_tells_who_comes_back(start: Callable[..., Any]) -> None:
    """It was started again, and kept nothing: there is nothing to come back to."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("-m", "bnserver", "--listen", address)
    first = start(*flags)
    first.line()
    world = _world(address, 0, 1)
    first.end(signal.SIGKILL)
    second = start(*flags)
    second.line()
    with pytest.raises(ServiceError, match=r"broke|this service knows nothing of the job: it was started anew"):
        world.barrier()
    world.leave()
