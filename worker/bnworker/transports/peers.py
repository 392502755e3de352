"""Ranks that hold the statistics themselves: what transports without an owner elsewhere have in common.

Every rank keeps a mirror of a layer's state, and sets it from the same totals, so all mirrors are alike. A transport of
this kind says how its ranks agree on a call and how arrays move between them; what is moved for which call is here,
always after all ranks have agreed on it, so buffers match.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, PlainSignature, Total
from bnlayer.reduction import Encoded, combined, decode, dtype_named, encode
from bnlayer.state import LayerState
from bnworker.transports import Seeded
from bnworker.transports.call_encoding import CallFingerprints, pushed_digest

CHUNK = 2**24  # elements per message: 128 MiB, far below the 2^31 bytes that old MPIs can count

Op = Literal["sum", "max"]
W = TypeVar("W")  # an exchange that has begun, for its waits


class PeerTransport(ABC, Generic[W]):
    """One rank of several that hold the statistics themselves.

    Args:
        rank: this one.
        world_size: the number of ranks.
        timeout: seconds that joining, and each exchange, may take.
        deterministic: add floats in rank order: the same bits as over the service, for more traffic.
    """

    name: str

    def __init__(self, rank: int, world_size: int, *, timeout: float, deterministic: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout, self._deterministic = timeout, deterministic
        self._pushed: dict[str, str] = {}
        self._fingerprints = CallFingerprints()
        self._exchange_number = 0
        self._last: Call | None = None

    # ---- the transport ----

    def enroll(self, call: Call, state: LayerState) -> Seeded:
        """Give rank 0's state to all ranks."""
        wait = self._agree(call)
        arrays = state.arrays()
        received = self._send_from(0, list(arrays.values()) if self.rank == 0 else None, wait)
        return Seeded(LayerState.from_arrays(dict(zip(arrays, received, strict=True)), state.forward.dtype))

    @abstractmethod
    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce limbs over the ranks; each rank has set its own mirror already."""

    def pull(self, layer: str) -> LayerState | None:
        """Every rank owns its own."""
        del layer
        return None

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Every rank owns its own; the next exchange of the layer finds out whether all pushed the same."""
        self._pushed[layer] = pushed_digest(self._pushed.get(layer, "nothing"), state)
        return None

    def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Reduce arrays as `bnlayer.reduction` says, but for the order of floats unless deterministic."""
        assert isinstance(call.signature, PlainSignature)
        op = call.signature.op
        wait = self._agree(call)
        encoded = encode(op, arrays)
        limbs = self._reduced(encoded.limbs, "sum" if op == "sum" else "max", wait)
        if self._deterministic:
            floats = self._added_in_rank_order(encoded.floats, wait)
        else:
            floats = self._reduced(encoded.floats, "sum", wait)
        return decode(op, Encoded(floats, limbs), arrays)

    def broadcast(self, call: Call, arrays: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The root's arrays."""
        assert isinstance(call.signature, PlainSignature)
        wait = self._agree(call)
        return self._send_from(call.signature.root, arrays, wait)

    def barrier(self, call: Call) -> None:
        """Agreeing is a barrier."""
        self._agree(call)

    @abstractmethod
    def leave(self, reason: str) -> None:
        """Leave the job: "" for a clean end, otherwise what failed."""

    # ---- how the ranks agree, and how data move ----

    @abstractmethod
    def _agree(self, call: Call, shape: tuple[int, ...] | None = None) -> W:
        """Return when all ranks have made the same call.

        Args:
            call: this rank's.
            shape: of the limbs that belong to the call.

        Raises:
            CollectiveError: they have not.
        """

    @abstractmethod
    def _reduced(self, array: NDArray[Any], op: Op, wait: W) -> NDArray[Any]:
        """The reduction of an array of the same shape and dtype on every rank, of any size."""

    @abstractmethod
    def _added_in_rank_order(self, floats: NDArray[np.float64], wait: W) -> NDArray[np.float64]:
        """The sum of a vector of the same length on every rank, added in rank order."""

    @abstractmethod
    def _broadcast(self, array: NDArray[Any], root: int, wait: W) -> None:
        """Send a contiguous vector of at most `CHUNK` elements from the root; every other rank's is overwritten."""

    def _send_from(self, root: int, arrays: Sequence[NDArray[Any]] | None, wait: W) -> list[NDArray[Any]]:
        """The root's arrays, whose shapes and dtypes nobody else knows; None on every other rank."""
        sizes, description, data = np.empty(2, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8)
        if arrays is not None:
            description = _bytes(json.dumps([[array.dtype.name, array.shape] for array in arrays]).encode())
            data = _bytes(*(array.tobytes() for array in arrays))
            sizes[:] = description.size, data.size
        self._broadcast(sizes, root, wait)
        if arrays is None:
            description, data = (np.empty(size, np.uint8) for size in sizes.tolist())
        self._broadcast(description, root, wait)
        for chunk in chunks(data):
            self._broadcast(chunk, root, wait)
        return list(arrays) if arrays is not None else _unpacked(description.tobytes(), data)


def chunks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Flat views of a contiguous array, none longer than one message may be; none of an empty one."""
    flat = array.reshape(-1)
    return (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))


def sum_of_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of the ranks' vectors, (ranks, n), added in rank order."""
    no_limbs = np.empty(0, np.int64)
    total = Encoded(rows[0], no_limbs)
    for row in rows[1:]:
        total = combined("sum", total, Encoded(row, no_limbs))
    return total.floats


def _bytes(*parts: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray().join(parts), np.uint8)


def _unpacked(description: bytes, data: NDArray[np.uint8]) -> list[NDArray[Any]]:
    kinds = [(dtype_named(name), shape) for name, shape in json.loads(description)]
    ends = np.cumsum([0, *(prod(shape) * dtype.itemsize for dtype, shape in kinds)]).tolist()
    return [
        np.frombuffer(data[start:end].tobytes(), np.uint8).view(dtype).reshape(shape).copy()
        for (dtype, shape), (start, end) in zip(kinds, pairwise(ends), strict=True)
    ]
