"""The world of one rank: what is put in comes out, under the same dtype rules as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from bnlayer.collective import Alone, Call, PlainSignature
from bnlayer.reduction import reduce_in_rank_order
from bnlayer.state import LayerState
from bnworker.transports import Seeded


class AloneTransport(Alone):
    """One rank, which owns everything and waits for nobody."""

    name = "alone"

    def enroll(self, call: Call, state: LayerState) -> Seeded:  # type: ignore[override]  # what a transport returns
        """The layer's own state is the owner's."""
        del call
        return Seeded(state)

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Nobody else owns anything."""
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
        """Everybody is here."""
        del call

    def leave(self, reason: str) -> None:
        """There is nobody to tell."""
        del reason
