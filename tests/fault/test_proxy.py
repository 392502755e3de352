"""The proxy itself: each fault does what its name says, where the plan says it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from support.fault.faults import HEALTHY, Fault, Kind, plan
from support.fault.proxy import Proxy, proxy

pytestmark = pytest.mark.fault


class _Echo:
    """A service that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.got = bytearray()
        self.ended = ""
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            try:
                while data := connection.recv(4096):
                    self.got += data
                    connection.sendall(data)
                self.ended = "end"
            except ConnectionError:
                self.ended = "reset"

    def end(self) -> str:
        """How its connection ended."""
        self._thread.join(150)
        self._socket.close()
        return self.ended


@contextmanager
def _through(fault: Fault) -> Iterator[tuple[socket.socket, _Echo, Proxy]]:
    echo = _Echo()
    with proxy(echo.address, 1, lambda rank, number: fault) as between:
        host, _, port = between.addresses[0].partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as rank:
            yield rank, echo, between
    echo.end()


def _received(rank: socket.socket) -> tuple[bytes, str]:
    """All that comes, and how it ends."""
    got = bytearray()
    try:
        while data := rank.recv(4096):
            got += data
    except ConnectionError:
        return bytes(got), "reset"
    return bytes(got), "end"


def test_a_healthy_connection_passes_everything() -> None:
    """Both ways, and the end of one way after the other."""
    data = bytes(range(256)) * 1000
    with _through(HEALTHY) as (rank, echo, _):

        def send() -> None:
            rank.sendall(data)
            rank.shutdown(socket.SHUT_WR)

        Thread(target=send, daemon=True).start()
        assert _received(rank) == (data, "end")
        assert echo.end() == "end"


@pytest.mark.parametrize(("kind", "ends"), [(Kind.CUT, "reset"), (Kind.CLOSE, "end")])
def test_a_cut_comes_after_so_many_bytes(kind: Kind, ends: str) -> None:
    """In the middle of a message: the service gets exactly the first bytes of it, and both ends hear of it."""
    with _through(Fault(kind, up=True, after=1234)) as (rank, echo, between):
        rank.sendall(bytes(2000))
        assert _received(rank)[1] == ends
        assert echo.end() in ("reset", "end")
        assert len(echo.got) == 1234
        assert between.story == [f"rank 0, connection 0: {kind} up after 1234 bytes, 0.000 s"]


def test_a_cut_reply() -> None:
    """The rank gets exactly the first bytes of an answer."""
    with _through(Fault(Kind.CLOSE, up=False, after=7)) as (rank, _, _):
        rank.sendall(bytes(100))
        assert _received(rank) == (bytes(7), "end")


def test_a_half_close_leaves_the_other_way_open() -> None:
    """The service hears the end and answers what it got; what the rank sends then goes nowhere."""
    with _through(Fault(Kind.HALF_CLOSE, up=True, after=10)) as (rank, echo, _):
        rank.sendall(bytes(20))
        assert _received(rank) == (bytes(10), "end")
        assert echo.end() == "end"
        assert len(echo.got) == 10


def test_a_blackhole_swallows_while_the_connection_stays_up() -> None:
    """Nothing arrives and nothing fails, until the reset at its end."""
    with _through(Fault(Kind.BLACKHOLE, up=False, after=5, seconds=0.3)) as (rank, _, _):
        rank.sendall(bytes(10))
        assert rank.recv(100) == bytes(5)
        began = time.monotonic()
        rank.sendall(bytes(10))
        assert _received(rank) == (b"", "reset")
        assert time.monotonic() - began > 0.2


def test_a_delay_delays_bytes() -> None:
    """All arrive, late; what comes much later does not."""
    with _through(Fault(Kind.DELAY, up=True, after=3, seconds=0.2)) as (rank, _, _):
        began = time.monotonic()
        rank.sendall(b"abcdef")
        rank.shutdown(socket.SHUT_WR)
        assert _received(rank) == (b"abcdef", "end")
        assert time.monotonic() - began >= 0.2


def test_a_lost_reply_is_one_to_a_request_that_arrived() -> None:
    """The service got all of it, the rank no byte of the answer."""
    with _through(Fault(Kind.LOST_REPLY, up=True, after=1)) as (rank, echo, _):
        rank.sendall(b"request")
        assert _received(rank) == (b"", "reset")
        echo.end()
        assert echo.got == b"request"


def test_a_missing_service_is_reported_as_such() -> None:
    """The rank's connection ends, and the next one is tried anew."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with proxy(address, 1, lambda rank, number: HEALTHY) as between:
        host, _, port = between.addresses[0].partition(":")
        for _ in range(2):
            # The reset may come while it still connects.
            with suppress(ConnectionResetError), socket.create_connection((host, int(port)), timeout=60) as rank:
                assert _received(rank)[1] == "reset"


def test_a_plan_follows_from_its_seed() -> None:
    """The same seed gives the same faults; another one others; and every kind occurs."""
    first = [plan(7, rank, number) for rank in range(3) for number in range(40)]
    assert first == [plan(7, rank, number) for rank in range(3) for number in range(40)]
    assert first != [plan(8, rank, number) for rank in range(3) for number in range(40)]
    assert {fault.kind for fault in first} == set(Kind) - {Kind.NONE}
    assert {fault.up for fault in first} == {True, False}
