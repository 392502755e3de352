"""What a rank refuses before it sends anything leaves no trace: the ranks stay in step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnworker import World
from support.contract.registry import as_text, body, rows_of

SECOND = r"a second exchange was begun before the first one was complete\. A rank makes one exchange at a time"


def while_one_waits(world: World, attempts: Callable[[], None]) -> None:
    """Make a barrier, within which this rank attempts something from another thread before the barrier is sent."""
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            attempts()
        except BaseException as error:  # noqa: BLE001 - raised again below
            raised.append(error)

    transport: Any = world._transport
    barrier = transport.barrier

    def held_up(call: Any) -> None:
        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join()
        barrier(call)

    transport.barrier = held_up
    try:
        world.barrier()
    finally:
        transport.barrier = barrier
    for error in raised:
        raise error


def sent(world: World) -> object:
    """What a refusal must not change."""
    return world.statistics.exchanges.copy(), world.statistics.bytes_sent, world.statistics.bytes_received


@body()
def a_refused_second_exchange_leaves_no_trace(world: World) -> object:
    """Rank 0 alone attempts each kind while it is in an exchange: its numbers stay those of the other ranks."""
    enrolled = BatchNormalization(name="enrolled", synchronized=True, collective=world)
    fresh = BatchNormalization(name="fresh", synchronized=True, collective=world)
    enrolled(rows_of(world.rank), training=True)
    before = enrolled.state

    def attempts() -> None:
        counted = sent(world)
        for second in (
            world.barrier,
            lambda: world.allreduce([np.ones(3)]),
            lambda: world.broadcast([np.ones(3)], root=world.rank),
            lambda: world.pull(enrolled),
            lambda: world.push(enrolled),
            lambda: enrolled(rows_of(world.rank), training=True),
            lambda: enrolled.backward(np.ones((8, 4))),
            lambda: fresh(rows_of(world.rank)[:, :3], training=True),
        ):
            with pytest.raises(RuntimeError, match=SECOND):
                second()
        assert sent(world) == counted

    while_one_waits(world, attempts if world.rank == 0 else lambda: None)
    assert not fresh.built
    assert enrolled.state is before
    (total,) = world.allreduce([np.ones(3)])
    assert (total == world.world_size).all()
    enrolled.backward(np.ones((8, 4)))
    enrolled(rows_of(world.rank), training=True)
    fresh = BatchNormalization(name="fresh", synchronized=True, collective=world)
    fresh(rows_of(world.rank), training=True)
    return [as_text(layer.moving_mean.value) for layer in (enrolled, fresh)]


@body()
def refused_arguments_leave_no_trace(world: World) -> object:
    """Rank 0 alone gives arguments that are refused: the ranks stay in step, and a layer's shape is still open."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    if world.rank == 0:
        for refused in (
            lambda: world.allreduce([np.ones(3)], op="mean"),  # type: ignore[arg-type]
            lambda: world.allreduce([np.array(["a"])]),
            lambda: world.allreduce(np.ones(3)),
            lambda: world.broadcast([np.array(["a"])]),
            lambda: world.broadcast([1.0], root=world.world_size),
            lambda: bn(np.ones((2, 3)), training=True, mask=np.ones((2, 3))),
            lambda: bn(np.array(["a"]), training=True),
            lambda: world.push(bn),
        ):
            with pytest.raises((TypeError, ValueError)):
                refused()
        assert not world.statistics.exchanges
        assert not world.statistics.bytes_sent
        assert not bn.built
    bn(rows_of(world.rank), training=True)
    if world.rank == 0:
        with pytest.raises(ValueError, match="expected dy of the output's shape"):
            bn.backward(np.ones((8, 3)))
        with pytest.raises(ValueError, match="is incompatible with it"):
            bn(np.ones((8, 3)), training=True)
    bn.backward(rows_of(world.rank))
    (total,) = world.allreduce([np.ones(3)])
    return [as_text(bn.moving_mean.value), as_text(total)]
