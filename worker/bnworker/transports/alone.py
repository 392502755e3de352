"""The world of one rank: every exchange returns its input, under the same dtype rules as the other transports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from bnlayer.collective import Alone, Call, PlainSignature
from bnlayer.reduction import reduce_in_rank_order
from bnlayer.state import LayerState
from bnworker.transports import Seeded


class AloneTransport(Alone):
    """One rank, which owns everything and never waits."""

    name = "alone"

    def enroll(self, call: Call, state: LayerState) -> Seeded:  # type: ignore[override]  # a transport returns `Seeded`
        """Return the layer's own state: there is no other owner."""
        del call
        return Seeded(state)

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Return None: there is no owner elsewhere."""
        del layer, state
        return None

    def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The arrays of one rank, copied."""
        assert isinstance(call.signature, PlainSignature)
        return reduce_in_rank_order(call.signature.op, [arrays])

    def broadcast(self, call: Call, arrays: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The root's arrays; the only rank is the root."""
        del call
        assert arrays is not None
        return list(arrays)

    def barrier(self, call: Call) -> None:
        """Return at once: there is no other rank."""
        del call

    def leave(self, reason: str) -> None:
        """Do nothing: there is no rank to notify."""
        del reason
