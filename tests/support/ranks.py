"""Ranks as threads of one process, exact as any transport, and as strict about disagreement.

The words are added in an order drawn from a seed, so that a result that depends on it shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.agreement import Verdict, check_agreement
from bnlayer.collective import Call, Operation, Total
from bnlayer.state import LayerState

T = TypeVar("T")


class Meeting:
    """Where the ranks of one simulated world meet.

    Attributes:
        calls: every exchange that was completed, as rank 0 said it, in order.
        bytes_sent: by rank 0.
    """

    def __init__(self, world_size: int, seed: int = 0) -> None:
        self.world_size = world_size
        self.calls: list[Call] = []
        self.bytes_sent = 0
        self._rng = np.random.default_rng(seed)
        self._given: dict[int, tuple[Call, Any]] = {}
        self._answer: Any = None
        self._barrier = threading.Barrier(world_size, self._complete, timeout=120)

    def meet(self, rank: int, call: Call, value: Any) -> Any:
        """Say a call and get the answer of all."""
        self._given[rank] = call, value
        self._barrier.wait()
        answer = self._answer
        self._barrier.wait()
        if isinstance(answer, Verdict):
            raise answer.error(call)
        return answer

    def _complete(self) -> None:
        if not self._given:
            return
        given, self._given = self._given, {}
        verdict = check_agreement({rank: call for rank, (call, _) in given.items()}, {}, {})
        if verdict is not None:
            self._answer = verdict
            return
        call, value = given[0]
        self.calls.append(call)
        if call.operation is Operation.ENROLL:
            self._answer = value
            return
        self.bytes_sent += value.nbytes
        limbs = np.stack([given[int(rank)][1] for rank in self._rng.permutation(self.world_size)])
        reduced = limbs.max(0) if call.operation is Operation.PROBE else np.add.reduce(limbs, 0)
        self._answer = Total(reduced)


class SimulatedRank:
    """One rank of a meeting: a `Collective`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.world_size = meeting.world_size

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Rank 0's state."""
        answer: LayerState = self._meeting.meet(self.rank, call, state)
        return answer

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """The reduced limbs."""
        answer: Total = self._meeting.meet(self.rank, call, limbs)
        return answer

    def pull(self, layer: str) -> LayerState | None:
        """Each rank owns its own."""
        del layer
        return None


def run_ranks(meeting: Meeting, body: Callable[[SimulatedRank], T]) -> list[T | Exception]:
    """Run a body on every rank; its results, or what it raised, in rank order."""
    results: list[Any] = [None] * meeting.world_size

    def run(rank: int) -> None:
        try:
            results[rank] = body(SimulatedRank(meeting, rank))
        except Exception as error:  # noqa: BLE001 - a thread's exception is one of the results
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(meeting.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive(), "a simulated rank hangs"
    return results


def run_all(meeting: Meeting, body: Callable[[SimulatedRank], T]) -> list[T]:
    """Run a body on every rank; its results in rank order. The first exception is raised."""
    results = []
    for result in run_ranks(meeting, body):
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results
