"""The world over a statistics service, which owns the moving statistics of all layers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, PlainTerms, Total
from bnlayer.errors import CollectiveError, ServiceError
from bnlayer.state import LayerState
from bnproto.arrays import named, pack, unpack
from bnproto.calls import contribution_of
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.stream import Stream

T = TypeVar("T")


class ServiceTransport:
    """One rank's seat in a job.

    Args:
        address: of the service, HOST:PORT.
        job: the job's name.
        rank, world_size: who this process is.
        token: the job's, where the service asks for one.
        timeout: seconds that joining, and each exchange, may take.

    Raises:
        ServiceError: nobody listens there, or the service refuses.
        MismatchError: the ranks disagree about the world size, or the rank is taken.
        StallError: not all ranks joined in time.
        PeerLostError: a rank was lost while this one waited for it.
    """

    name = "service"

    def __init__(
        self,
        address: str,
        job: str,
        rank: int,
        world_size: int,
        *,
        token: str | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._address = address
        self._sequence = 0
        start = time.monotonic()
        self._stream = Stream(address, timeout)
        join = pb.Join(
            job=job,
            rank=rank,
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            token=token or "",
            join_timeout_ms=max(1, round((start + timeout - time.monotonic()) * 1000)),
            timeout_ms=max(1, round(timeout * 1000)),
        )
        try:
            self._stream.send(pb.ExchangeRequest(join=join))
            self._generation = self._stream.receive().generation
        except BaseException:
            self._stream.close(None)
            raise

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Make a layer known to all ranks; returns the owner's state, seeded by rank 0's."""
        arrays = state.arrays()
        dtype = state.forward.dtype

        def ask() -> LayerState:
            result = self._exchanged(call, arrays.values(), tuple(arrays))
            return self._state(result.payload, dtype)

        return self._at(call, ask)

    def exchange(self, call: Call, words: NDArray[np.int64]) -> Total:
        """Reduce words over the ranks: MAX for a probe, SUM for sums."""

        def ask() -> Total:
            result = self._exchanged(call, (words,))
            (total,) = self._arrays(result.payload)
            return Total(total, result.version)

        return self._at(call, ask)

    def pull(self, layer: str) -> LayerState | None:
        """The owner's state of a layer; None if it has none of this name yet."""
        return self._owned(pb.ExchangeRequest(pull=pb.Pull(layer=layer)), [])

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Replace the owner's state of a layer; returns it with the owner's new version."""
        arrays = state.arrays()
        payload, parts = pack(arrays.values(), tuple(arrays))
        request = pb.Push(layer=layer, dtype=state.forward.dtype, payload=payload)
        return self._owned(pb.ExchangeRequest(push=request), parts)

    def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Reduce arrays over the ranks, in rank order.

        Raises:
            OverflowError: an integer sum does not fit its dtype; on every rank.
        """

        def ask() -> list[NDArray[Any]]:
            result = self._exchanged(call, arrays)
            if result.overflow:
                raise OverflowError(result.overflow)
            return self._arrays(result.payload)

        return self._at(call, ask)

    def broadcast(self, call: Call, arrays: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The arrays of the rank that `call.terms` names; None on every other rank."""
        assert isinstance(call.terms, PlainTerms)
        mine = arrays if call.terms.root == self.rank else None

        def ask() -> list[NDArray[Any]]:
            result = self._exchanged(call, mine)
            return self._arrays(result.payload) if mine is None else [array.copy() for array in mine]

        return self._at(call, ask)

    def barrier(self, call: Call) -> None:
        """Return when every rank has called it."""
        self._at(call, lambda: self._exchanged(call, None))

    def leave(self, reason: str) -> None:
        """Say goodbye: "" for a clean end, otherwise what failed. Never raises; quick after an error."""
        self._stream.close(reason)

    def _exchanged(self, call: Call, arrays: Iterable[NDArray[Any]] | None, names: Sequence[str] = ()) -> pb.Result:
        """Contribute, and wait for what comes of it."""
        payload, parts = pack(arrays, names) if arrays is not None else (None, [])
        contribution = contribution_of(call, payload, self._sequence + 1, self._generation)
        self._stream.send(pb.ExchangeRequest(contribution=contribution), parts)
        result = self._stream.receive().result
        if result.sequence != contribution.sequence:
            raise ServiceError(
                f"The service at {self._address} answered contribution {result.sequence}, expected an answer to "
                f"{contribution.sequence}. An exchange of this rank was interrupted: leave, and join anew."
            )
        self._sequence = result.sequence
        return result

    def _owned(self, request: pb.ExchangeRequest, parts: list[pb.Part]) -> LayerState | None:
        self._stream.send(request, parts)
        owned = self._stream.receive().owned
        return self._state(owned.payload, owned.dtype) if owned.known else None

    def _state(self, payload: pb.Payload, dtype: str) -> LayerState:
        arrays = named(payload, self._stream.data(payload))
        return LayerState.from_arrays({name: array.copy() for name, array in arrays.items()}, dtype)

    def _arrays(self, payload: pb.Payload) -> list[NDArray[Any]]:
        """Arrays of the caller's own: what was received is read-only."""
        return [array.copy() for array in unpack(payload, self._stream.data(payload))]

    def _at(self, call: Call, ask: Callable[[], T]) -> T:
        """Do it, and let errors say in which exchange this rank was when it heard of them."""
        try:
            return ask()
        except CollectiveError as error:
            if error.layer is None and error.step is None:
                error.layer, error.step = call.place.layer, call.place.step
            raise
