"""Moments of data that lie on all ranks: on every transport what one process has, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import RunningMoments, moments
from bnlayer.collective import Alone
from bnworker import World
from support.contract.registry import as_text, body

_X = np.random.default_rng(0).normal(1e4, 3, (17, 5)) * np.array([1, 1e-200, 1e200, 1, 1])


@body()
def moments_are_those_of_one_process(world: World) -> object:
    """Of float64 over 400 powers of ten, float32, integers, with a mask, and with no rows but on one rank."""
    mask = np.arange(85).reshape(17, 5) % 3 > 0
    saw = []
    for x in (_X, _X[:, ::3].astype(np.float32), np.arange(34).reshape(17, 2) ** 9):
        part, m = world.shard(17), mask[:, : x.shape[1]]
        for got, want in (
            (moments(x[part], 0, collective=world), moments(x, 0, collective=Alone())),
            (moments(x[part], 0, m[part], collective=world), moments(x, 0, m, collective=Alone())),
            (moments(x[: 9 * (world.rank == 0)], collective=world), moments(x[:9], collective=Alone())),
        ):
            saw.append([as_text(a) for a in got])
            assert saw[-1] == [as_text(a) for a in want]
    return saw


@body()
def running_moments_count_each_row_once(world: World) -> object:
    """Through uneven batches, a restart from the state, and the sum with another history."""
    part = world.shard(17)
    mine, one = RunningMoments(5, collective=world), RunningMoments((5,), collective=Alone())
    for step in range(3):
        mine.update(_X[part] + step)
        one.update((_X + step).reshape(17, 1, 5))
    restored = RunningMoments(5, collective=world)
    restored.load_state_dict(mine.state_dict())
    restored.update(_X[part][:2])
    starts = [start + k for start in _starts(world) for k in (0, 1)]
    one.update(_X[starts])
    both = restored + mine
    assert restored == one
    assert both.count.tolist() == [17 * 6 + 2 * world.world_size] * 5
    return [as_text(array) for array in (*restored.state_dict().values(), *both.statistics())]


def _starts(world: World) -> list[int]:
    each, more = divmod(17, world.world_size)
    return [rank * each + min(rank, more) for rank in range(world.world_size)]


@body(sizes=(2, 3))
def running_moments_refuse_what_would_drift(world: World) -> object:
    """Histories that differ, and values that are not finite: on every rank alike, and nothing is added."""
    seen = RunningMoments(2, collective=world)
    seen.update(np.ones((1, 2)))
    before = RunningMoments(2, collective=world) + seen
    bad = np.array([[1.0, np.nan if world.rank == 1 else 1.0]])
    with pytest.raises(ValueError, match="a value is not finite, in 1 of 2 channels of the ranks' rows"):
        seen.update(bad)
    assert seen == before
    seen.update(bad, mask=np.isfinite(bad))
    assert seen.count.tolist() == [2 * world.world_size, 2 * world.world_size - 1]
    if world.rank == 0:
        seen.load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="The ranks hold different histories: load the same state_dict"):
        seen.update(np.ones((1, 2)))
    return None
