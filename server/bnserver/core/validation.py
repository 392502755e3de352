"""Validation of requests: an invalid one is refused before it changes anything.

These are all checks of one request by itself, and `validated` is where they are made: at the edge, by the connection on
which it arrived. Whether it is the rank's turn is checked in `generation`, whether the ranks agree with each other in
`bnlayer.agreement`, and whether they agree with the owner in `layers`.
"""

from __future__ import annotations

import math
import re

import numpy as np

from bnlayer.collective import CHECKPOINT, Call, Direction, LayerSignature, Operation, PlainSignature
from bnlayer.gradients import GradientSums
from bnlayer.moments import Moments
from bnlayer.precision import DOUBLE, SINGLE
from bnlayer.state import LayerState
from bnserver.core.events import Body, Contribute, Join, Leave, Limbs, Malformed, Pull, Push, Replacing

NAME_CHARACTERS = 200  # of a job or a layer: it is part of every error and of file names
# It is part of the name of a file, and has no slash and no dot at its begin.
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CHECKPOINT_NAMES = "1 to 100 letters, digits, dots, dashes and underscores, the first a letter or a digit,"
_STEP = re.compile(r"0|[1-9][0-9]{0,18}")
_HOST_CHARACTERS = 255
_TERM_CHARACTERS = 1000  # of what a plain operation says of one of its arrays or layers
_SHOWN_CHARACTERS = 60  # of what was received instead
_MOST_VERSION = 2**62  # there is room for as many more before a version has no form in int64
_PRECISIONS = {precision.name: precision for precision in (SINGLE, DOUBLE)}
_EXCHANGES = (Operation.PROBE, Operation.SUMS)
_MOST_TERMS = 2**40  # a channel of more would overflow its limbs
_MOST_RANKS = 2**20  # the limbs have no room for more
_OPS = ("sum", "max", "min")
_GRADIENTS_ABOVE = 20  # the largest window of gradients lies so far above that of the data: `BackwardGrid.probed`
_SPREADS = ("moving_variance", "moving_stddev", "renorm_stddev")

# Rows of limbs, by (dtype, is a probe, direction).
_ROWS: dict[tuple[str, bool, Direction | None], int] = {
    (name, probe, direction): 2 if probe else kind.rows(precision.folds)
    for name, precision in _PRECISIONS.items()
    for probe in (True, False)
    for direction, kind in ((Direction.FORWARD, Moments), (Direction.BACKWARD, GradientSums))
}
Request = Join | Contribute | Pull | Push | Leave


class RefusedError(ValueError):
    """Raised by every check below; the text says what was expected and what was received."""


def validated(event: Request, world_size: int = 0) -> Request | Malformed:
    """The event; or, if it is invalid, what takes its place.

    Args:
        event: a request.
        world_size: of the job that its rank has joined.
    """
    try:
        match event:
            case Contribute() if event.sequence < 1:
                raise RefusedError(f"expected the number of a contribution, 1 or more, received {event.sequence}")
            case Contribute() if isinstance(event.call.signature, LayerSignature):
                _check_layer(event.call, event.call.signature, event.body)
            case Contribute() if isinstance(event.call.signature, PlainSignature):
                _check_plain(event.call, event.call.signature, event.body, world_size)
            case Join():
                _check_join(event)
            case Pull():
                _check_name(event.layer)
            case Push():
                _check_name(event.layer)
                _check_state(event.state)
    except RefusedError as error:
        return Malformed(event.connection, str(error), event.call if isinstance(event, Contribute) else None)
    return event


# ---- one check for each kind of request ----


def _check_join(join: Join) -> None:
    if not 1 <= len(join.job) <= NAME_CHARACTERS:
        raise RefusedError(f"expected a job name of 1 to {NAME_CHARACTERS} characters, received {len(join.job)}")
    if not 0 <= join.peer.rank < join.world_size <= _MOST_RANKS:
        raise RefusedError(
            f"expected 0 <= rank < world_size <= {_MOST_RANKS}, received rank {join.peer.rank} and world_size "
            f"{join.world_size}; check how the ranks were started"
        )
    if len(join.peer.host) > _HOST_CHARACTERS:
        raise RefusedError(
            f"expected the name of a host of up to {_HOST_CHARACTERS} characters, received {len(join.peer.host)}"
        )
    elastic = join.elastic
    if elastic is not None and not 1 <= elastic.minimum <= elastic.maximum <= _MOST_RANKS:
        raise RefusedError(f"expected 1 <= MIN <= MAX <= {_MOST_RANKS} of an elastic job, received {elastic}")
    if not (join.timeout > 0 and join.join_timeout > 0):
        raise RefusedError(f"expected a timeout above 0 s, received {min(join.timeout, join.join_timeout)}")


def _check_name(layer: str | None) -> None:
    if layer is None or not 1 <= len(layer) <= NAME_CHARACTERS:
        raise _invalid_name(layer)


def _invalid_name(layer: str | None) -> RefusedError:
    return RefusedError(f"expected a layer name of 1 to {NAME_CHARACTERS} characters, received {_shown(layer)}")


def _check_state(state: LayerState) -> None:
    if state.channels < 1:
        raise RefusedError("expected a state of 1 channel or more, received none")
    if state.forward.dtype not in _PRECISIONS:
        raise RefusedError(f"expected a state in {' or '.join(_PRECISIONS)}, received {_shown(state.forward.dtype)}")
    if not 0 <= state.version <= _MOST_VERSION:
        raise RefusedError(f"expected a version from 0 to 2^62, received {state.version}")
    for name, values in state.moving.vectors.items():
        numbers = values.astype(np.float64)
        if not np.isfinite(numbers).all():
            raise RefusedError(f"expected finite numbers in {name}, received NaN or infinity")
        if name in _SPREADS and numbers.min() < 0:
            raise RefusedError(f"expected numbers of 0 or more in {name}, received {numbers.min():g}")
    grid, backward, precision = state.forward, state.backward, _PRECISIONS[state.forward.dtype]
    if not np.isfinite(grid.pivot_C).all():
        raise RefusedError("expected a grid of finite pivots, received NaN or infinity")
    lowest, highest = precision.lowest, precision.highest
    _check_exponents("grid", grid.exponent_C, lowest, highest)
    _check_exponents("grid of gradients", backward.gradient_C, lowest, highest + _GRADIENTS_ABOVE)
    _check_exponents("grid of deviations", backward.deviation_C, lowest, precision.deviation_ceiling)


def _check_exponents(what: str, exponents: Limbs, lowest: int, highest: int) -> None:
    if exponents.min() < lowest or exponents.max() > highest:
        raise RefusedError(
            f"expected a {what} of exponents from {lowest} to {highest}, received exponents from {exponents.min()} to "
            f"{exponents.max()}"
        )


def _check_layer(call: Call, signature: LayerSignature, body: Body) -> None:
    layer = call.key.layer
    if layer is None or not 1 <= len(layer) <= NAME_CHARACTERS:
        raise _invalid_name(layer)
    if call.operation not in (Operation.ENROLL, *_EXCHANGES):
        raise RefusedError(f"expected an operation of a layer for layer {layer!r}, received {call.operation}")
    _check_signature(layer, signature)
    if call.operation is Operation.ENROLL:
        if not isinstance(body, LayerState) or call.key.direction is not None:
            raise RefusedError(f"expected the state of layer {layer!r} and no direction in its enrolment")
        _check_state_of(layer, signature, body)
        return
    if call.key.direction is None:
        raise RefusedError(f"expected a direction for the {call.operation} of layer {layer!r}, received none")
    if (call.key.direction is Direction.BACKWARD) is (call.forward_step is None):
        wanted = "no step of" if call.forward_step is not None else "the step of"
        raise RefusedError(
            f"expected {wanted} a training call to pull back in {call.key}, received {call.forward_step}"
        )
    if (signature.state != 0) is not isinstance(body, Replacing) or (signature.state and call.attempt):
        raise RefusedError(
            f"expected a state that was set in the first contribution to {call.key}, and where its fingerprint is "
            f"sent; received the fingerprint {signature.state:016x} in round {call.attempt}"
        )
    if isinstance(body, Replacing):
        _check_state_of(layer, signature, body.state)
        if body.state.fingerprint != signature.state:
            raise RefusedError(
                f"expected a state of the fingerprint {signature.state:016x} for layer {layer!r}, received one of "
                f"{body.state.fingerprint:016x}"
            )
        body = body.limbs
    _check_limbs(call, signature, body)


def _check_state_of(layer: str, signature: LayerSignature, state: LayerState) -> None:
    if (state.channels, state.forward.dtype) != (signature.channels, signature.dtype):
        raise RefusedError(
            f"expected a state of {signature.channels} channels in {signature.dtype} for layer {layer!r}, received "
            f"one of {state.channels} in {state.forward.dtype}"
        )
    if (signature.renorm is None) != (state.moving.stddev is None):
        wanted, got = ("no ", "some") if signature.renorm is None else ("", "none")
        raise RefusedError(f"expected {wanted}statistics of renorm in the state of layer {layer!r}, received {got}")
    _check_state(state)


def _check_signature(layer: str, signature: LayerSignature) -> None:
    if signature.channels < 1 or signature.dtype not in _PRECISIONS:
        raise RefusedError(
            f"expected 1 channel or more in {' or '.join(_PRECISIONS)} for layer {layer!r}, received "
            f"{signature.channels} in {_shown(signature.dtype)}"
        )
    if len(signature.policy) > NAME_CHARACTERS:
        raise RefusedError(
            f"expected the name of a dtype policy for layer {layer!r}, received {_shown(signature.policy)}"
        )
    if not (math.isfinite(signature.momentum) and math.isfinite(signature.epsilon) and signature.epsilon >= 0):
        raise RefusedError(
            f"expected a finite momentum and an epsilon of 0 or more for layer {layer!r}, received "
            f"{signature.momentum} and {signature.epsilon}"
        )
    if signature.renorm is not None and not math.isfinite(signature.renorm.momentum):
        raise RefusedError(
            f"expected a finite momentum of renorm for layer {layer!r}, received {signature.renorm.momentum}"
        )


def _check_limbs(call: Call, signature: LayerSignature, body: Body) -> None:
    shape = (_ROWS[signature.dtype, call.operation is Operation.PROBE, call.key.direction], signature.channels)
    if not isinstance(body, np.ndarray):
        raise RefusedError(f"expected one array of int64 limbs for the {call.operation} of {call.key}")
    limbs: Limbs = body
    if limbs.dtype != np.int64 or limbs.shape != shape:
        raise RefusedError(
            f"expected int64 limbs of shape {shape} for the {call.operation} of {call.key}, received {limbs.dtype} "
            f"of shape {limbs.shape}"
        )
    if call.operation is Operation.PROBE:
        return
    # One comparison for both bounds: a negative count or flag is huge as an unsigned number.
    if limbs[-2:].view(np.uint64).max() <= _MOST_TERMS:
        return
    if call.key.direction is Direction.FORWARD:
        count = limbs[-2]
        if count.min() < 0 or count.max() > _MOST_TERMS:
            raise RefusedError(
                f"expected counts from 0 to 2^40 for the {call.operation} of {call.key}, received {count.min()} to "
                f"{count.max()}"
            )
    if limbs[-1].min() < 0:
        raise RefusedError(
            f"expected flags of 0 or more for the {call.operation} of {call.key}, received {limbs[-1].min()}"
        )


def _check_plain(call: Call, signature: PlainSignature, body: Body, world_size: int) -> None:
    if call.key.layer is not None or call.key.direction is not None:
        raise RefusedError(f"expected no layer for the plain operation {call.operation}, received {call.key}")
    longest = max((signature.op, *signature.arrays), key=len)
    if len(longest) > _TERM_CHARACTERS:
        raise RefusedError(f"expected terms of up to {_TERM_CHARACTERS} characters, received {_shown(longest)}")
    match call.operation:
        case Operation.REDUCE:
            if signature.op not in _OPS or not isinstance(body, tuple):
                raise RefusedError(f"expected arrays and one of {', '.join(_OPS)}, received {_shown(signature.op)}")
        case Operation.BROADCAST:
            if not 0 <= signature.root < world_size:
                raise RefusedError(f"expected a root from 0 to {world_size - 1}, received {signature.root}")
        case Operation.BARRIER:
            if body is not None:
                raise RefusedError("expected no arrays in a barrier")
            if signature.op == CHECKPOINT:
                _check_checkpoint(signature.arrays)
        case _:
            raise RefusedError(f"expected the terms of a layer for {call.operation}, received plain ones")


def _check_checkpoint(fields: tuple[str, ...]) -> None:
    if len(fields) != len(("name", "step")):
        raise RefusedError(f"expected the name and the step of a checkpoint, received {len(fields)} terms")
    name, step = fields
    if not CHECKPOINT_NAME.fullmatch(name):
        raise RefusedError(f"expected {CHECKPOINT_NAMES} as the name of a checkpoint, received {_shown(name)}")
    if not (_STEP.fullmatch(step) and int(step) <= _MOST_VERSION):
        raise RefusedError(f"expected a checkpoint's step from 0 to 2^62, received {_shown(step)}")


def _shown(received: str | None) -> str:
    """What a rank sent, in so few characters that an error stays one."""
    if received is None or len(received) <= _SHOWN_CHARACTERS:
        return repr(received)
    return f"{received[:_SHOWN_CHARACTERS]!r}… of {len(received)} characters"
