"""Jobs of one and two ranks for those who look on, and what a daemon says of where it can be looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bnlayer import BatchNormalization
from bnproto.credentials import NONE, Credentials
from bnworker import World
from bnworker.transports.service import ServiceTransport

X = np.arange(12, dtype=np.float32).reshape(6, 2)
LONG_S = 200.0


def joined(
    address: str, rank: int = 0, world_size: int = 1, job: str = "job", credentials: Credentials = NONE
) -> World:
    """One rank, as a world that no layer finds by itself."""
    transport = ServiceTransport(address, job, rank, world_size, timeout=LONG_S, credentials=credentials)
    return World(transport, install=False)


@contextmanager
def paired(address: str, body: Callable[[World], None], job: str = "job") -> Iterator[World]:
    """Rank 0 of a job of two, while rank 1 does something in a thread; both leave."""

    def second() -> None:
        with joined(address, 1, 2, job) as world:
            body(world)

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with joined(address, 0, 2, job) as world:
        yield world
    thread.join(LONG_S)
    assert not thread.is_alive()


def train(world: World, steps: int, begin: int = 0) -> BatchNormalization:
    """Training calls of one layer, "a"; all ranks alike."""
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    for step in range(begin, begin + steps):
        layer(X + step, training=True)
    return layer


def logged_url(log: Path, what: str) -> str:
    """The last word of a line of the log."""
    (line,) = [line for line in log.read_text(encoding="utf-8").splitlines() if what in line]
    return line.split()[-1]


def until(true: Callable[[], bool]) -> None:
    """Wait; a test that waits in vain ends by its timeout."""
    while not true():
        time.sleep(0.02)
