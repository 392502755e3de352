"""An address is looked at before a job is started."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bnworker.launcher.reach import reach
from bnworker.launcher.starting import LaunchError


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A socket on loopback with a port, at which nobody listens yet."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def _address(bound: socket.socket) -> str:
    return "{}:{}".format(*bound.getsockname())


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":7431", "localhost:http", "localhost:0", "h:65536"])
def test_what_is_no_address(address: str) -> None:
    """A typing error is told as one."""
    with pytest.raises(LaunchError) as raised:
        reach(address, 0)
    assert str(raised.value) == f"expected an address HOST:PORT, such as 127.0.0.1:7431, received {address!r}."
    assert raised.value.code == 2


def test_an_ipv6_address_needs_brackets() -> None:
    """Nothing says where its host ends."""
    with pytest.raises(LaunchError, match=r"received '::1:7431'\. An IPv6 host stands in brackets: \[::1\]:7431\.$"):
        reach("::1:7431", 0)


def test_a_service_listens_at_the_address(silent: socket.socket) -> None:
    """Nothing else is asked of it."""
    silent.listen()
    reach(_address(silent), 0)


def test_nothing_listens_at_the_address(silent: socket.socket) -> None:
    """Told at once, with the reason and what to do."""
    with pytest.raises(LaunchError) as raised:
        reach(_address(silent), 0)
    assert str(raised.value).startswith(f"no statistics service at {_address(silent)}: Connection refused. Check the")
    assert raised.value.code == 2


def test_a_service_that_starts_late(silent: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, until the time is over."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            silent.listen()

    monkeypatch.setattr(time, "sleep", sleep)
    reach(_address(silent), 600)
    assert len(pauses) == 3


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing bounds a resolver but us."""
    over = threading.Event()

    def hang(*_: object) -> None:
        over.wait(150)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    with pytest.raises(LaunchError, match=r"no statistics service at example.org:1: no answer within 0.05 s"):
        reach("example.org:1", 0, answer_s=0.05)
    over.set()
