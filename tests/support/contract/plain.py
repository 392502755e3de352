"""Who am I, shards, broadcasts, barriers, statistics, and the end."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bnlayer import CollectiveError
from bnlayer.collective import Operation
from bnlayer.reduction import FLOATS, INTEGERS, dtype_named
from bnworker import World
from support.contract.registry import as_text, body, of_rank


@body()
def knows_itself(world: World) -> object:
    """Rank, number of ranks and transport."""
    assert 0 <= world.rank < world.world_size
    expected = f"World(rank={world.rank}, world_size={world.world_size}, transport={world.transport!r})"
    assert repr(world) == expected
    return [world.world_size, world.transport]


@body()
def shards_cover_all_rows_once(world: World) -> object:
    """The slices of all ranks lie end to end; the first n mod W hold one row more."""
    for n in (0, 1, 2, 3, 7, 100):
        mine = np.zeros(n, np.int64)
        mine[world.shard(n)] = 1
        (total,) = world.allreduce([mine])
        assert (total == 1).all()
        (sizes,) = world.allreduce([np.eye(world.world_size, dtype=np.int64)[world.rank] * int(mine.sum())])
        each, more = divmod(n, world.world_size)
        assert sizes.tolist() == [each + (rank < more) for rank in range(world.world_size)]
    return None


@body()
def broadcast_brings_dtype_and_shape_along(world: World) -> object:
    """From each rank in turn; the others need not know what comes."""
    seen = []
    for root in range(world.world_size):
        arrays = [of_rank(root, dtype_named(name)) for name in (*FLOATS, *INTEGERS, "bool")]
        arrays += [np.zeros((0, 2), np.float32), np.array(7, np.int16)]
        got = world.broadcast(arrays if world.rank == root else None, root=root)
        assert [as_text(array) for array in got] == [as_text(array) for array in arrays]
        assert all(a.flags.writeable and not np.shares_memory(a, b) for a, b in zip(got, arrays, strict=True) if a.size)
        seen.append([as_text(array) for array in got])
    assert world.broadcast([], root=0) == []
    return seen


@body()
def broadcast_needs_a_root_that_exists(world: World) -> object:
    """A root that is no rank is refused before anything is sent."""
    for root in (-1, world.world_size):
        with pytest.raises(ValueError) as caught:
            world.broadcast([1.0], root=root)
        assert str(caught.value) == (f"broadcast(root=): expected 0 <= root < {world.world_size}, received {root}.")
    world.barrier()
    return None


@body()
def barriers_repeat(world: World) -> object:
    """Many barriers in a row."""
    for _ in range(20):
        world.barrier()
    return world.statistics.exchanges[None, None, Operation.BARRIER]


@body()
def statistics_count_what_was_exchanged(world: World) -> object:
    """Exchanges by kind, bytes of data, time spent waiting."""
    begin = time.perf_counter()
    world.allreduce([np.zeros(4, np.float32)])
    world.broadcast([np.zeros(2)] if world.rank == 0 else None)
    elapsed = time.perf_counter() - begin
    statistics = world.statistics
    assert statistics.exchanges == {(None, None, Operation.REDUCE): 1, (None, None, Operation.BROADCAST): 1}
    assert statistics.bytes_sent == (32 if world.rank == 0 else 16)
    assert statistics.bytes_received == 32
    assert 0 < statistics.waiting_seconds < elapsed
    return None


@body()
def a_world_that_was_left_refuses_exchanges(world: World) -> object:
    """Leaving twice is nothing; exchanging afterwards is an error."""
    world.leave()
    world.leave()
    with pytest.raises(RuntimeError) as caught:
        world.barrier()
    assert not isinstance(caught.value, CollectiveError)
    assert str(caught.value) == f"{world!r}: this world was left; make exchanges inside `with bnworker.join()`."
    assert repr(world).endswith(", left)")
    return None
