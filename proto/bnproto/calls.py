"""A rank's `Call` on the wire, and back. Every field of a call has its own place in the message.

Words that this version does not know (an operation, a direction) are refused: law 6 of the protocol.
"""

from __future__ import annotations

from bnlayer.collective import Call, Direction, LayerTerms, Operation, Place, PlainTerms
from bnlayer.renorm import Renorm
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
        layer=call.place.layer,
        direction=_TO_DIRECTION[call.place.direction],
        step=call.place.step,
        attempt=call.attempt,
        payload=payload,
    )
    terms = call.terms
    if isinstance(terms, PlainTerms):
        message.plain_terms.op = terms.op
        message.plain_terms.arrays.extend(terms.arrays)
        message.plain_terms.root = terms.root
        return message
    message.layer_terms.channels = terms.channels
    message.layer_terms.dtype = terms.dtype
    message.layer_terms.momentum = terms.momentum
    message.layer_terms.epsilon = terms.epsilon
    message.layer_terms.masked = terms.masked
    message.layer_terms.policy = terms.policy
    if terms.renorm is not None:
        message.layer_terms.renorm.CopyFrom(_renorm_message(terms.renorm))
    message.layer_terms.unbiased = terms.unbiased
    message.layer_terms.flush_to_zero = terms.flush_to_zero
    message.layer_terms.grid = terms.grid
    return message


def call_of(message: pb.Contribution) -> Call:
    """The call that a message says.

    Raises:
        WireError: the operation, the direction or the terms are missing or unknown.
    """
    operation = _FROM_OPERATION.get(message.operation)
    if operation is None:
        raise WireError(f"expected one of the operations {_known(_FROM_OPERATION)}; received {message.operation}")
    if message.direction not in _FROM_DIRECTION:
        raise WireError(f"expected one of the directions {_known(_FROM_DIRECTION)}; received {message.direction}")
    layer = message.layer if message.HasField("layer") else None
    place = Place(layer, _FROM_DIRECTION[message.direction], message.step)
    return Call(operation, place, _terms(message), message.attempt)


def _terms(message: pb.Contribution) -> LayerTerms | PlainTerms:
    kind = message.WhichOneof("terms")
    if kind == "layer_terms":
        layer = message.layer_terms
        return LayerTerms(
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
        )
    if kind == "plain_terms":
        plain = message.plain_terms
        return PlainTerms(plain.op, tuple(plain.arrays), plain.root)
    raise WireError("expected the terms of a layer or of a plain operation, received neither")


def _renorm_message(renorm: Renorm) -> pb.Renorm:
    return pb.Renorm(momentum=renorm.momentum, rmax=renorm.rmax, rmin=renorm.rmin, dmax=renorm.dmax)


def _renorm(message: pb.Renorm) -> Renorm:
    limits = (getattr(message, name) if message.HasField(name) else None for name in ("rmax", "rmin", "dmax"))
    return Renorm(message.momentum, *limits)


def _known(table: dict[pb.Operation.ValueType, Operation] | dict[pb.Direction.ValueType, Direction | None]) -> str:
    return ", ".join(f"{wire} ({meaning})" for wire, meaning in table.items())
