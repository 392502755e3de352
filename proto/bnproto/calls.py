"""A rank's `Call` on the wire, and back. Every field of a call has its own field in the message.

Values that this version does not know (an operation, a direction) are refused: law 6 of the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnproto.arrays import WireError
from bnproto.v1 import statistics_pb2 as pb

_TO_OPERATION = {
    Operation.ENROLL: pb.OPERATION_ENROLL,
    Operation.PROBE: pb.OPERATION_PROBE,
    Operation.SUMS: pb.OPERATION_SUMS,
    Operation.REDUCE: pb.OPERATION_REDUCE,
    Operation.BROADCAST: pb.OPERATION_BROADCAST,
    Operation.BARRIER: pb.OPERATION_BARRIER,
}
_TO_DIRECTION = {
    None: pb.DIRECTION_UNSPECIFIED,
    Direction.FORWARD: pb.DIRECTION_FORWARD,
    Direction.BACKWARD: pb.DIRECTION_BACKWARD,
}
_FROM_OPERATION = {wire: operation for operation, wire in _TO_OPERATION.items()}
_FROM_DIRECTION = {wire: direction for direction, wire in _TO_DIRECTION.items()}


def contribution_of(call: Call, payload: pb.Payload | None, sequence: int, generation: int) -> pb.Contribution:
    """A call and its numbers as a message."""
    message = pb.Contribution(
        sequence=sequence,
        generation=generation,
        operation=_TO_OPERATION[call.operation],
        layer=call.key.layer,
        direction=_TO_DIRECTION[call.key.direction],
        step=call.key.step,
        attempt=call.attempt,
        forward_step=call.forward_step,
        payload=payload,
    )
    signature = call.signature
    if isinstance(signature, PlainSignature):
        message.plain_signature.op = signature.op
        message.plain_signature.arrays.extend(signature.arrays)
        message.plain_signature.root = signature.root
        return message
    message.layer_signature.channels = signature.channels
    message.layer_signature.dtype = signature.dtype
    message.layer_signature.momentum = signature.momentum
    message.layer_signature.epsilon = signature.epsilon
    message.layer_signature.masked = signature.masked
    message.layer_signature.policy = signature.policy
    if signature.renorm is not None:
        message.layer_signature.renorm.CopyFrom(_renorm_message(signature.renorm))
    message.layer_signature.unbiased = signature.unbiased
    message.layer_signature.flush_to_zero = signature.flush_to_zero
    message.layer_signature.grid = signature.grid
    message.layer_signature.keeps_moving = not signature.update_moving
    message.layer_signature.own_weights = signature.own_weights
    message.layer_signature.state = signature.state
    message.layer_signature.weights = signature.weights
    message.layer_signature.anew = signature.anew
    return message


def operation_of(call: Call) -> pb.Operation.ValueType:
    """What a call asks for, on the wire."""
    return _TO_OPERATION[call.operation]


def direction_of(call: Call) -> pb.Direction.ValueType:
    """The direction of a call, on the wire."""
    return _TO_DIRECTION[call.key.direction]


def call_of(message: pb.Contribution) -> Call:
    """The call in a message.

    Raises:
        WireError: the operation, the direction or the signature is missing or unknown.
    """
    operation = _FROM_OPERATION.get(message.operation)
    if operation is None:
        raise WireError(f"expected one of the operations {_supported(_FROM_OPERATION)}; received {message.operation}")
    if message.direction not in _FROM_DIRECTION:
        raise WireError(f"expected one of the directions {_supported(_FROM_DIRECTION)}; received {message.direction}")
    layer = message.layer if message.HasField("layer") else None
    key = ExchangeKey(layer, _FROM_DIRECTION[message.direction], message.step)
    forward_step = message.forward_step if message.HasField("forward_step") else None
    return Call(operation, key, _signature(message), message.attempt, forward_step)


def with_state(limbs: NDArray[np.int64], state: LayerState) -> dict[str, NDArray[Any]]:
    """The arrays of a contribution with the state that its rank set: the limbs have no name."""
    return {"": limbs, **state.arrays()}


def without_state(arrays: Mapping[str, NDArray[Any]], dtype: str) -> tuple[NDArray[np.int64], LayerState]:
    """The limbs and the state that `with_state` put together.

    Raises:
        WireError: the limbs are missing.
        ValueError: the state is invalid.
    """
    if "" not in arrays:
        raise WireError(f"expected limbs beside the state that was set, received {', '.join(arrays) or 'nothing'}")
    return arrays[""], LayerState.from_arrays(arrays, dtype)


def _signature(message: pb.Contribution) -> LayerSignature | PlainSignature:
    kind = message.WhichOneof("signature")
    if kind == "layer_signature":
        layer = message.layer_signature
        return LayerSignature(
            channels=layer.channels,
            dtype=layer.dtype,
            momentum=layer.momentum,
            epsilon=layer.epsilon,
            masked=layer.masked,
            policy=layer.policy,
            renorm=_renorm(layer.renorm) if layer.HasField("renorm") else None,
            unbiased=layer.unbiased,
            flush_to_zero=layer.flush_to_zero,
            grid=layer.grid,
            update_moving=not layer.keeps_moving,
            own_weights=layer.own_weights,
            state=layer.state,
            weights=layer.weights,
            anew=layer.anew,
        )
    if kind == "plain_signature":
        plain = message.plain_signature
        return PlainSignature(plain.op, tuple(plain.arrays), plain.root)
    raise WireError("expected the terms of a layer or of a plain operation, received neither")


def _renorm_message(renorm: Renorm) -> pb.Renorm:
    return pb.Renorm(momentum=renorm.momentum, rmax=renorm.rmax, rmin=renorm.rmin, dmax=renorm.dmax)


def _renorm(message: pb.Renorm) -> Renorm:
    limits = (getattr(message, name) if message.HasField(name) else None for name in ("rmax", "rmin", "dmax"))
    return Renorm(message.momentum, *limits)


def _supported(table: dict[pb.Operation.ValueType, Operation] | dict[pb.Direction.ValueType, Direction | None]) -> str:
    return ", ".join(f"{wire} ({meaning})" for wire, meaning in table.items())
