"""Readers of moving statistics, at moments that no test from outside could choose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import grpc
import numpy as np
import pytest

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnproto.v1 import observation_pb2 as pb
from bnserver import observing
from bnserver.observing import ObservationServicer


def _state(version: int, mean: float, channels: int = 2) -> LayerState:
    moving = Moving(np.full(channels, mean, np.float32), np.ones(channels, np.float32))
    grids = Grid.unknown("float32", channels), BackwardGrid.unknown("float32", channels)
    return LayerState(moving, *grids, version)


class _Exchanges:
    """A service with one job, to which something happens after some looks."""

    def __init__(self, happens: Callable[[_Exchanges], None] | None = None, after: int = 2) -> None:
        self.active = True
        self.kept: dict[str, LayerState] | None = {"a": _state(1, 1.0)}
        self._happens = happens
        self._left = after

    def is_active(self, job: str) -> bool:
        assert job == "j"
        self._left -= 1
        if self._left == 0 and self._happens is not None:
            self._happens(self)
        return self.active

    async def states(self, job: str) -> dict[str, LayerState] | None:
        assert job == "j"
        return self.kept


class _Ended(Exception):
    pass


class _Context:
    def __init__(self) -> None:
        self.written: list[pb.ReadStatisticsResponse] = []
        self.code: grpc.StatusCode | None = None
        self.text = ""

    async def write(self, message: pb.ReadStatisticsResponse) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, text: str, _: Any) -> None:
        self.code, self.text = code, text
        raise _Ended


def _asked(servicer: ObservationServicer, **fields: Any) -> _Context:
    context = _Context()

    async def ask() -> None:
        request = pb.ReadStatisticsRequest(job="j", wait_ms=30_000, **fields)
        await servicer.ReadStatistics(request, cast("Any", context))

    asyncio.run(ask())
    return context


def _servicer(exchanges: _Exchanges) -> ObservationServicer:
    return ObservationServicer(cast("Any", exchanges))


def _seen(exchanges: _Exchanges) -> dict[str, bytes]:
    """What a reader has that has asked before."""
    (first, _) = _asked(_servicer(exchanges)).written
    return {"a": first.statistics.stamp}


def test_a_reader_waits_for_a_change() -> None:
    """It is answered when there is one, and not before."""

    def happens(exchanges: _Exchanges) -> None:
        exchanges.kept = {"a": _state(2, 2.0)}

    first, last = _asked(_servicer(_Exchanges(happens)), seen=_seen(_Exchanges())).written
    assert (first.statistics.layer, first.statistics.version) == ("a", 2)
    assert last.job == pb.JobSeen(known=True, over=False)


def test_the_last_values_of_a_job_that_ends_between_two_looks() -> None:
    """They would be missing: it changed, and was over, when the service looked second."""

    def happens(exchanges: _Exchanges) -> None:
        exchanges.active, exchanges.kept = False, {"a": _state(2, 2.0)}

    first, last = _asked(_servicer(_Exchanges(happens)), seen=_seen(_Exchanges())).written
    assert first.statistics.version == 2
    assert last.job == pb.JobSeen(known=True, over=True)


@pytest.mark.parametrize("kept", [None, {"a": _state(1, 1.0)}])
def test_what_is_over_is_said_at_once_but_to_those_who_wait_forever(kept: dict[str, LayerState] | None) -> None:
    """They wait for the next run."""
    exchanges = _Exchanges()
    exchanges.active, exchanges.kept = False, kept
    (last,) = _asked(_servicer(exchanges), seen=_seen(_Exchanges())).written
    assert last.job == pb.JobSeen(known=kept is not None, over=True)

    def happens(exchanges: _Exchanges) -> None:
        exchanges.active, exchanges.kept = True, {"a": _state(2, 2.0)}

    exchanges = _Exchanges(happens)
    exchanges.active, exchanges.kept = False, kept
    first, _ = _asked(_servicer(exchanges), seen=_seen(_Exchanges()), forever=True).written
    assert first.statistics.version == 2


def test_a_reader_does_not_hold_up_the_end_of_the_service() -> None:
    """It would be waited for, for as long as ranks are."""
    exchanges = _Exchanges(lambda _: servicer.close())
    servicer = _servicer(exchanges)
    context, seen = _Context(), _seen(_Exchanges())

    async def ask() -> None:
        request = pb.ReadStatisticsRequest(job="j", wait_ms=30_000, seen=seen)
        with pytest.raises(_Ended):
            await servicer.ReadStatistics(request, cast("Any", context))

    asyncio.run(ask())
    assert (context.code, context.text) == (grpc.StatusCode.UNAVAILABLE, "The service is stopping.")


def test_readers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is told so; and places come free."""
    monkeypatch.setattr(observing, "_READERS", 1)
    answers: list[_Context] = []

    def happens(exchanges: _Exchanges) -> None:
        exchanges.kept = {"a": _state(2, 2.0)}

    servicer = _servicer(_Exchanges(happens, after=3))
    seen = _seen(_Exchanges())

    async def scene() -> None:
        request = pb.ReadStatisticsRequest(job="j", wait_ms=30_000, seen=seen)
        first, second, third = _Context(), _Context(), _Context()
        waiting = asyncio.create_task(servicer.ReadStatistics(request, cast("Any", first)))
        await asyncio.sleep(0)
        with pytest.raises(_Ended):
            await servicer.ReadStatistics(request, cast("Any", second))
        await waiting
        await servicer.ReadStatistics(request, cast("Any", third))
        answers.extend((first, second, third))

    asyncio.run(scene())
    second = answers[1]
    assert [len(one.written) for one in answers] == [2, 0, 2]
    assert second.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert second.text.startswith("1 readers wait for statistics already, the most that this service takes.")


def test_a_reader_gets_other_statistics_of_the_same_version() -> None:
    """Ranks that set earlier statistics take the version back: then it comes by the same number once more."""
    first = observing._Reader(pb.ReadStatisticsRequest())
    assert first.lacks({"a": _state(3, 1.0), "b": _state(3, 1.0)})
    seen = {layer: stamp for layer, _, stamp in first.changed}
    second = observing._Reader(pb.ReadStatisticsRequest(seen=seen))
    assert not second.lacks({"a": _state(3, 1.0), "b": _state(3, 1.0)})
    assert second.lacks({"a": _state(3, 2.0), "b": _state(3, 1.0)})
    assert [layer for layer, _, _ in second.changed] == ["a"]


@pytest.mark.parametrize("states", [None, {}, {"other": _state(1, 1.0)}])
def test_a_reader_of_one_layer_gets_no_others(states: dict[str, LayerState] | None) -> None:
    """Nor of a job that is not there."""
    assert not observing._Reader(pb.ReadStatisticsRequest(layers=["a"])).lacks(states)
