"""What ranks do in the plays of `support.session`: a program yields what it asks for, and is sent the answer."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.exchange import ForwardExchange
from bnlayer.moving import Rule
from bnlayer.state import LayerState
from bnproto.arrays import named, payload_of, unpack
from bnproto.calls import contribution_of
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.service_channel import Answer
from support.forward_exchange import bits, contribution, unprobed_state

T = TypeVar("T")
Asked = tuple[pb.ExchangeRequest, pb.Payload | None]
"""A request without its numbers, and its payload."""
Asking = Generator[Asked, Answer, T]
Program = Asking[list[bytes]]

_SIGNATURE = LayerSignature(2, "float32", 0.9, 0.001)
_RULE = Rule(_SIGNATURE.momentum, _SIGNATURE.epsilon)


def train(rank: int, steps: int) -> Program:
    """Enrol a layer, then train it with plain operations in between; returns the bits of all that was received."""
    call = Call(Operation.ENROLL, ExchangeKey("a", None, 0), _SIGNATURE)
    state = _state((yield _contribution(call, unprobed_state(2).arrays())).response.result)
    got: list[bytes] = [bits(state)]
    for step in range(steps):
        state = yield from _forward(rank, step, state, got)
        call = Call(Operation.REDUCE, ExchangeKey(None, None, 3 * step), PlainSignature("sum", ("float64[30]",)))
        got.append(bytes((yield _contribution(call, {"": np.full(30, 0.1 * (rank + step))})).data))
        root = step % 2
        call = Call(Operation.BROADCAST, ExchangeKey(None, None, 3 * step + 1), PlainSignature(root=root))
        answer = yield _contribution(call, {"": np.array([step])} if rank == root else None)
        got.append(np.array([step]).tobytes() if rank == root else bytes(answer.data))
        if rank == 0:  # the owner's version goes up; everybody fetches it
            request = pb.ExchangeRequest(push=pb.Push(layer="a", dtype="float32", number=step + 1))
            yield request, _payload(state.arrays())
        yield _contribution(Call(Operation.BARRIER, ExchangeKey(None, None, 3 * step + 2), PlainSignature()), None)
        answer = yield pb.ExchangeRequest(pull=pb.Pull(layer="a")), None
        state = _state(answer.response.owned)
        got.append(bits(state))
        answer = yield pb.ExchangeRequest(pull=pb.Pull(layer="another")), None
        assert not answer.response.owned.known  # answers to pulls have no number
    # A plain operation leaves no trace on disk: if it came last, its answer would be lost with a rank that has it and
    # leaves just before the service is killed.
    yield from _forward(rank, steps, state, got)
    return got


def _forward(rank: int, step: int, state: LayerState, got: list[bytes]) -> Asking[LayerState]:
    """A training call; returns the mirror after it."""
    version, exchange = 0, ForwardExchange.begin(state.forward, _SIGNATURE.epsilon, False)
    x = np.full((rank + 1, 2, 1), 0.5 * step - rank, np.float32) * np.float32(10.0**step)
    while exchange.wants is not None:
        call, limbs = contribution(exchange, ExchangeKey("a", Direction.FORWARD, step), _SIGNATURE, x)
        answer = yield _contribution(call, {"": limbs})
        (total,) = unpack(answer.response.result.payload, answer.data)
        version, exchange = answer.response.result.version, exchange.reduced(total)
        got.append(total.tobytes())
    assert exchange.statistics is not None
    state = state.after_forward(exchange.statistics, exchange.grid, _RULE)
    assert version == state.version
    return state


def _contribution(call: Call, arrays: dict[str, NDArray[Any]] | None) -> Asked:
    payload = None if arrays is None else _payload(arrays)
    return pb.ExchangeRequest(contribution=contribution_of(call, None, 0, 0)), payload


def _payload(arrays: dict[str, NDArray[Any]]) -> pb.Payload:
    return payload_of(arrays.values(), tuple(arrays))


def _state(message: pb.Result | pb.Owned) -> LayerState:
    return LayerState.from_arrays(named(message.payload, message.payload.data), "float32")
