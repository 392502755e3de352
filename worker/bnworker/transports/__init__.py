"""The interface of a transport, by which a world reaches other ranks.

Laws:
1. A rank has at most one outstanding call. Every rank makes the same calls, or all of them get the same error.
2. A transport validates nothing and stores no errors: `World` does.
3. Limbs are reduced exactly: MAX for a probe, SUM for sums. They can't overflow: see `bnlayer.limbs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, Total
from bnlayer.state import LayerState


class Seeded(NamedTuple):
    """The result of an enrolment.

    Attributes:
        state: that of all ranks from now on.
        known: whether the owner had it before, so that it is not rank 0's.
    """

    state: LayerState
    known: bool = False


class Transport(Protocol):
    """One rank's end of the exchanges; implemented by `alone`, `mpi`, `service` and `torch`."""

    @property
    def name(self) -> str:
        """`"alone"`, `"mpi"`, `"service"` or `"torch"`."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def enroll(self, call: Call, state: LayerState) -> Seeded:
        """Enroll a layer with all ranks; returns the owner's state, seeded by rank 0's."""

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce limbs over the ranks; an owner elsewhere takes over the state that all of them have set."""

    def pull(self, layer: str) -> LayerState | None:
        """The owner's state of a layer; None where each rank owns its own."""

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Replace the owner's state; returns it with its new version, or None where each rank owns its own."""

    def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Reduce arrays as `bnlayer.reduction` says; `call.signature` names the op, dtypes and shapes."""

    def broadcast(self, call: Call, arrays: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The arrays of the rank that `call.signature` names; None on every other rank."""

    def barrier(self, call: Call) -> None:
        """Return when every rank has called it."""

    def leave(self, reason: str) -> None:
        """Leave the job: "" for a clean end, otherwise what failed. Never raises; quick after an error."""
