"""Two of three ranks can't go on, and the third computes: they get the error within 1 s, and it at its next call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np
import pytest

from bnlayer import BatchNormalization, CollectiveError, MismatchError, StallError
from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.contract.timing import FAILURE_WITHIN_S, Watch, watch
from support.service import daemon

pytestmark = [pytest.mark.fault, pytest.mark.rpc]

_X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of one service for all tests here."""
    with daemon() as at:
        yield at


def _other_layers(world: World) -> None:
    name = "a" if world.rank == 0 else "b"
    BatchNormalization(name=name, synchronized=True, collective=world)(_X, training=True)


def _other_momenta(world: World) -> None:
    momentum = 0.9 if world.rank == 0 else 0.99
    BatchNormalization(name="a", synchronized=True, momentum=momentum, collective=world)(_X, training=True)


def _one_leaves(world: World) -> None:
    if world.rank == 0:
        world.leave()
    else:
        world.barrier()


@pytest.mark.parametrize(
    ("say", "kind"), [(_other_layers, StallError), (_other_momenta, MismatchError), (_one_leaves, StallError)]
)
def test_a_failure_reaches_a_rank_that_computes(
    say: Callable[[World], None], kind: type[CollectiveError], address: str
) -> None:
    """Counted from the last of the two; the third, which comes later, hears the same text."""
    go_on = threading.Event()
    watches = [Watch()] * 3

    def rank(number: int) -> str:
        transport = ServiceTransport(address, say.__name__, number, 3, timeout=60)
        watches[number] = watch(transport)
        with World(transport, install=False) as world:
            if number == 2:
                go_on.wait(150)
            try:
                world.barrier() if number == 2 else say(world)
            except kind as error:
                return str(error)
            return ""

    with futures.ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(rank, number) for number in range(3)]
        texts = [one.result(150) for one in ranks[:2]]
        go_on.set()
        texts.append(ranks[2].result(150))
    assert texts[1]
    assert set(texts) <= {"", texts[1]}
    contributed_at = max(one.contributed_at for one in watches[:2])
    for one in watches[:2]:
        assert one.failed_at is None or one.failed_at - contributed_at <= FAILURE_WITHIN_S
    computing = watches[2]
    assert computing.failed_at is not None
    assert computing.failed_at - computing.contributed_at <= FAILURE_WITHIN_S
