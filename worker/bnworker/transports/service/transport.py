"""The world over a statistics service, which owns the moving statistics of all layers."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, PlainSignature, Total
from bnlayer.errors import CollectiveError
from bnlayer.state import LayerState
from bnproto.arrays import named, pack, unpack
from bnproto.calls import contribution_of, with_state
from bnproto.connection import Connector
from bnproto.credentials import NONE, Credentials
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports import Seeded
from bnworker.transports.service.client import Client
from bnworker.transports.service.service_channel import Answer

_NO_CHECKPOINTS = (
    "The service keeps no checkpoints: it is of an earlier version than its ranks. Upgrade it, with bnlayer serve."
)


class ServiceTransport:
    """One rank's seat in a job.

    Args:
        address: of the service, HOST:PORT.
        job: the job's name.
        rank, world_size: who this process is.
        timeout: seconds that joining, and each exchange, may take.
        local_socket: whether to exchange over a local socket where the service is on this machine.
        credentials: what is used towards the service.
        left: called once this rank has left.
        elastic: how many ranks the job may have; the service then chooses the rank, and `world_size` is how many were
            started together.

    Raises:
        CredentialsError: they can't be read, or would cross a network in plain text.
        ServiceError: nothing listens there, or the service refuses.
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
        timeout: float = 300.0,
        local_socket: bool = True,
        credentials: Credentials = NONE,
        left: Callable[[], None] | None = None,
        elastic: pb.Elastic | None = None,
    ) -> None:
        self._pushes = 0
        self._left = left
        join = pb.Join(
            job=job,
            rank=rank,
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            join_timeout_ms=max(1, round(timeout * 1000)),
            timeout_ms=max(1, round(timeout * 1000)),
            incarnation=secrets.randbits(63) + 1,
            elastic=elastic,
        )
        connector = Connector(address, credentials)
        self._client = Client(connector, join, timeout, local_socket=local_socket)
        self.rank, self.world_size = join.rank, join.world_size  # as joined

    @property
    def generation(self) -> int:
        """Of the job: which of its rendezvous this is, from 1."""
        return self._client.session.generation

    def enroll(self, call: Call, state: LayerState) -> Seeded:
        """Enroll a layer with all ranks; returns the owner's state, seeded by rank 0's."""
        arrays = state.arrays()
        answer = self._exchanged(call, arrays.values(), tuple(arrays))
        result = answer.response.result
        return Seeded(_state(result.payload, answer.data, state.forward.dtype), result.known)

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce limbs over the ranks: MAX for a probe, SUM for sums. The owner takes over the state that they set."""
        arrays = {"": limbs} if state is None else with_state(limbs, state)
        answer = self._exchanged(call, arrays.values(), tuple(arrays))
        (total,) = unpack(answer.response.result.payload, answer.data)
        return Total(total.copy(), answer.response.result.version)

    def pull(self, layer: str) -> LayerState | None:
        """The owner's state of a layer; None if it has none of this name yet."""
        return self._owned(layer, pb.ExchangeRequest(pull=pb.Pull(layer=layer)), [])

    def push(self, layer: str, state: LayerState) -> LayerState | None:
        """Replace the owner's state of a layer; returns it with the owner's new version."""
        arrays = state.arrays()
        payload, parts = pack(arrays.values(), tuple(arrays))
        self._pushes += 1
        request = pb.Push(layer=layer, dtype=state.forward.dtype, payload=payload, number=self._pushes)
        return self._owned(layer, pb.ExchangeRequest(push=request), parts)

    def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Reduce arrays over the ranks, in rank order.

        Raises:
            OverflowError: an integer sum does not fit its dtype; on every rank.
        """
        result = self._exchanged(call, arrays)
        overflow = result.response.result.overflow
        if overflow:
            raise OverflowError(overflow)
        return _arrays(result)

    def broadcast(self, call: Call, arrays: Sequence[NDArray[Any]] | None) -> list[NDArray[Any]]:
        """The arrays of the rank that `call.signature` names; None on every other rank."""
        assert isinstance(call.signature, PlainSignature)
        mine = arrays if call.signature.root == self.rank else None
        result = self._exchanged(call, mine)
        return _arrays(result) if mine is None else [array.copy() for array in mine]

    def barrier(self, call: Call) -> None:
        """Return when every rank has called it."""
        self._exchanged(call, None)

    def checkpoint(self, call: Call) -> str:
        """Have the owner keep its state under a name; returns why it did not, or ""."""
        result = self._exchanged(call, None).response.result
        return result.refused if result.HasField("refused") else _NO_CHECKPOINTS

    def leave(self, reason: str) -> None:
        """Leave the job: "" for a clean end, otherwise what failed. Never raises; quick after an error."""
        self._client.close(reason)
        if self._left is not None:
            self._left()

    def _exchanged(self, call: Call, arrays: Iterable[NDArray[Any]] | None, names: Sequence[str] = ()) -> Answer:
        """Contribute, and wait for the answer; errors say in which exchange this rank was."""
        session = self._client.session
        payload, parts = pack(arrays, names) if arrays is not None else (None, [])
        contribution = contribution_of(call, payload, session.repetition.answered + 1, session.generation)
        try:
            return self._client.request(pb.ExchangeRequest(contribution=contribution), parts)
        except CollectiveError as error:
            if error.layer is None and error.step is None:
                error.layer, error.step = call.key.layer, call.key.step
            raise

    def _owned(self, layer: str, request: pb.ExchangeRequest, parts: list[pb.Part]) -> LayerState | None:
        answer = self._client.request(request, parts)
        owned = answer.response.owned
        if not owned.known:
            return None
        state = _state(owned.payload, answer.data, owned.dtype)
        self._client.note_version(layer, state.version)
        return state


def _state(payload: pb.Payload, data: bytes | bytearray, dtype: str) -> LayerState:
    arrays = named(payload, data)
    return LayerState.from_arrays({name: array.copy() for name, array in arrays.items()}, dtype)


def _arrays(answer: Answer) -> list[NDArray[Any]]:
    """Arrays of the caller's own: what was received is read-only."""
    return [array.copy() for array in unpack(answer.response.result.payload, answer.data)]
