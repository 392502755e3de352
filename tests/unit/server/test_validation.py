"""What has no meaning is refused, by name, before it touches anything."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnserver.core.events import Body, Contribute, Join, Malformed, Pull, Push, Replacing
from bnserver.core.validation import Request, validated

_SIGNATURE = LayerSignature(2, "float32", 0.9, 0.001)
_FORWARD = ExchangeKey("a", Direction.FORWARD, 0)
_BACKWARD = ExchangeKey("a", Direction.BACKWARD, 0)
_ENROL = ExchangeKey("a", None, 0)
_PLAIN = ExchangeKey(None, None, 0)
_LIMBS = np.zeros((6, 2), np.int64)
_STATE = LayerState(
    Moving(np.zeros(2, np.float32), np.ones(2, np.float32)),
    Grid.unknown("float32", 2),
    BackwardGrid.unknown("float32", 2),
)


_RENORMING = replace(_STATE, moving=Moving(*[np.ones(2, np.float32)] * 5))


def _moved(**vectors: np.ndarray[Any, np.dtype[np.float32]]) -> LayerState:
    return replace(_STATE, moving=_STATE.moving._replace(**vectors))


def _changed(limbs: np.ndarray[Any, np.dtype[np.int64]], row: int, value: int) -> np.ndarray[Any, Any]:
    limbs = limbs.copy()
    limbs[row, 1] = value
    return limbs


_SAID = replace(_SIGNATURE, state=_STATE.fingerprint)
_SET = Replacing(_LIMBS, replace(_STATE, version=7))

_GOOD: list[tuple[Call, Body]] = [
    (Call(Operation.SUMS, _FORWARD, _SAID), _SET),
    (Call(Operation.PROBE, _BACKWARD, _SAID, 0, 0), Replacing(_LIMBS[:2], _STATE)),
    (Call(Operation.ENROLL, _ENROL, _SIGNATURE), _STATE),
    (Call(Operation.PROBE, _FORWARD, _SIGNATURE), np.full((2, 2), -(2**60), np.int64)),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), _LIMBS),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), _changed(_LIMBS, -2, 2**40)),
    (Call(Operation.SUMS, _BACKWARD, _SIGNATURE, 0, 0), _changed(_LIMBS, 0, -5)),
    (Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, dtype="float64")), np.zeros((10, 2), np.int64)),
    (Call(Operation.REDUCE, _PLAIN, PlainSignature("sum")), ()),
    (Call(Operation.BROADCAST, _PLAIN, PlainSignature(root=1)), None),
    (Call(Operation.BARRIER, _PLAIN, PlainSignature()), None),
]

_BAD: list[tuple[Call, Body, str]] = [
    (
        Call(Operation.SUMS, _FORWARD, _SIGNATURE),
        _SET,
        "a state that was set in the first .* received the fingerprint 0000",
    ),
    (Call(Operation.SUMS, _FORWARD, _SAID), _LIMBS, "a state that was set in the first contribution to layer 'a'"),
    (Call(Operation.SUMS, _FORWARD, _SAID, 1), _SET, "in round 1"),
    (Call(Operation.SUMS, _FORWARD, replace(_SAID, state=1)), _SET, "of the fingerprint 0000000000000001 for layer"),
    (Call(Operation.SUMS, _FORWARD, replace(_SAID, renorm=Renorm())), _SET, "expected statistics of renorm .* none"),
    (Call(Operation.SUMS, _FORWARD, _SAID), Replacing(_LIMBS[:5], _STATE), r"of shape \(6, 2\)"),
    (
        Call(Operation.SUMS, _FORWARD._replace(layer=None), _SIGNATURE),
        _LIMBS,
        "a layer name of 1 to 200 characters, rece",
    ),
    (Call(Operation.SUMS, _FORWARD._replace(layer=""), _SIGNATURE), _LIMBS, "received ''"),
    (Call(Operation.SUMS, _FORWARD._replace(layer="x" * 201), _SIGNATURE), _LIMBS, "1 to 200 characters"),
    (Call(Operation.BARRIER, _FORWARD, _SIGNATURE), None, "an operation of a layer for layer 'a', received barrier"),
    (
        Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, channels=0)),
        _LIMBS,
        "1 channel or more in float32 or float64",
    ),
    (Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, dtype="int8")), _LIMBS, "received 2 in 'int8'"),
    (Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, momentum=np.nan)), _LIMBS, "a finite momentum"),
    (Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, epsilon=-1.0)), _LIMBS, "epsilon of 0 or more"),
    (Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, renorm=Renorm(np.inf))), _LIMBS, "a finite momentum of renorm"),
    (
        Call(Operation.ENROLL, _ENROL, replace(_SIGNATURE, renorm=Renorm())),
        _STATE,
        "expected statistics of renorm .* none",
    ),
    (Call(Operation.ENROLL, _ENROL, _SIGNATURE), _RENORMING, "expected no statistics of renorm .* received some"),
    (Call(Operation.ENROLL, _ENROL, _SIGNATURE), None, "expected the state of layer 'a'"),
    (Call(Operation.ENROLL, _FORWARD, _SIGNATURE), _STATE, "no direction in its enrolment"),
    (
        Call(Operation.ENROLL, _ENROL, replace(_SIGNATURE, channels=3)),
        _STATE,
        "a state of 3 channels in float32 for layer",
    ),
    (Call(Operation.SUMS, _ENROL, _SIGNATURE), _LIMBS, "a direction for the sums of layer 'a', received none"),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), None, "one array of int64 limbs"),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), _LIMBS[:5], r"of shape \(6, 2\) for the sums of layer 'a'.*\(5, 2\)"),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), _LIMBS.astype(np.float64), "received float64"),
    (Call(Operation.PROBE, _BACKWARD, _SIGNATURE, 0, 0), _LIMBS, r"of shape \(2, 2\)"),
    (
        Call(Operation.SUMS, _FORWARD, _SIGNATURE),
        _changed(_LIMBS, -2, -1),
        r"counts from 0 to 2\^40 .* received -1 to 0",
    ),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE), _changed(_LIMBS, -2, 2**40 + 1), r"counts from 0 to 2\^40"),
    (Call(Operation.SUMS, _BACKWARD, _SIGNATURE, 0, 0), _changed(_LIMBS, -1, -1), "flags of 0 or more .* received -1"),
    (
        Call(Operation.SUMS, _BACKWARD, _SIGNATURE),
        _LIMBS,
        r"the step of a training call to pull back in .*, received None",
    ),
    (Call(Operation.SUMS, _FORWARD, _SIGNATURE, 0, 3), _LIMBS, r"no step of a training call .*, received 3"),
    (Call(Operation.REDUCE, _FORWARD, PlainSignature("sum")), (), "no layer for the plain operation allreduce"),
    (Call(Operation.REDUCE, _PLAIN, PlainSignature("mean")), (), "one of sum, max, min, received 'mean'"),
    (Call(Operation.REDUCE, _PLAIN, PlainSignature("sum")), None, "expected arrays and one of"),
    (Call(Operation.BROADCAST, _PLAIN, PlainSignature(root=2)), None, "a root from 0 to 1, received 2"),
    (Call(Operation.BARRIER, _PLAIN, PlainSignature()), (), "no arrays in a barrier"),
    (
        Call(Operation.REDUCE, _PLAIN, PlainSignature("sum", ("x" * 1001,))),
        (),
        r"terms of up to 1000 characters, received 'x{60}'… of 1001 characters$",
    ),
    (
        Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, dtype="x" * 10**6)),
        _LIMBS,
        "received 2 in 'x{60}'… of 1000000 characters$",
    ),
    (
        Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, policy="x" * 201)),
        _LIMBS,
        "a dtype policy for layer 'a', received 'x{60}'… of 201 characters$",
    ),
    (Call(Operation.SUMS, _PLAIN, PlainSignature()), _LIMBS, "the terms of a layer for sums, received plain ones"),
]


def _refusal(event: Request, text: str) -> Malformed:
    """What takes the place of an invalid request."""
    refusal = validated(event, world_size=2)
    assert isinstance(refusal, Malformed)
    assert refusal.connection == event.connection
    assert re.search(text, refusal.text)
    return refusal


@pytest.mark.parametrize(("call", "body"), _GOOD)
def test_what_ranks_send_is_let_in(call: Call, body: Body) -> None:
    """The checks refuse nothing that a layer or a world sends."""
    contribution = Contribute(1, 1, 1, call, body)
    assert validated(contribution, world_size=2) is contribution


@pytest.mark.parametrize(("call", "body", "text"), _BAD)
def test_what_has_no_meaning_is_refused(call: Call, body: Body, text: str) -> None:
    """Each refusal says what was expected and what was received."""
    assert _refusal(Contribute(1, 1, 1, call, body), text).call is call


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (replace(_STATE, moving=Moving(np.zeros(0, np.float32), np.zeros(0, np.float32))), "1 channel or more"),
        (replace(_STATE, version=-1), r"a version from 0 to 2\^62, received -1"),
        (replace(_STATE, version=2**62 + 1), r"a version from 0 to 2\^62, received 4611686018427387905"),
        (_moved(variance=np.array([1, -0.5], np.float32)), "numbers of 0 or more in moving_variance, received -0.5"),
        (
            replace(_RENORMING, moving=_RENORMING.moving._replace(stddev=np.array([-1, 2], np.float32))),
            "numbers of 0 or more in moving_stddev, received -1",
        ),
        (
            replace(_RENORMING, moving=_RENORMING.moving._replace(renorm_stddev=np.array([-1, 2], np.float32))),
            "numbers of 0 or more in renorm_stddev, received -1",
        ),
        (
            replace(_STATE, backward=BackwardGrid("float32", np.array([0, 147]), np.zeros(2, np.int64), False)),
            "gradients .* to 147",
        ),
        (
            replace(_STATE, backward=BackwardGrid("float32", np.zeros(2, np.int64), np.array([-161, 0]), False)),
            "a grid of deviations of exponents from -160 to 130, received exponents from -161 to 0",
        ),
        (
            _moved(mean=np.array([0, np.nan], np.float32)),
            "finite numbers in moving_mean",
        ),
        (replace(_STATE, forward=replace(_STATE.forward, pivot_C=np.array([0, np.nan]))), "a grid of finite pivots"),
        (replace(_STATE, forward=replace(_STATE.forward, exponent_C=np.array([0, 127]))), "exponents from 0 to 127"),
        (
            replace(_STATE, forward=replace(_STATE.forward, exponent_C=np.array([0, -161]))),
            "from -160 to 126, received",
        ),
        (
            _moved(variance=np.array([np.inf, 0], np.float32)),
            "finite numbers in moving_variance",
        ),
    ],
)
def test_impossible_states_are_refused(state: LayerState, text: str) -> None:
    """A state enters the owner's by an enrolment, a push, or set by all ranks: NaN would be kept for good."""
    _refusal(Push(1, "a", state), text)
    if state.channels == 2 and state.moving.stddev is None:
        reported = Call(Operation.SUMS, _FORWARD, replace(_SIGNATURE, state=state.fingerprint))
        _refusal(Contribute(1, 1, 1, reported, Replacing(_LIMBS, state)), text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"job": ""}, "a job name of 1 to 200 characters, received 0"),
        ({"job": "x" * 201}, "received 201"),
        ({"world_size": 0}, "0 <= rank < world_size <= 1048576, received rank 0 and world_size 0"),
        ({"world_size": 2**20 + 1}, "received rank 0 and world_size 1048577"),
        ({"peer": Peer(2)}, "received rank 2 and world_size 2"),
        ({"peer": Peer(0, "h" * 256)}, "the name of a host of up to 255 characters, received 256"),
        ({"timeout": 0.0}, "a timeout above 0 s"),
        ({"join_timeout": float("nan")}, "a timeout above 0 s"),
    ],
)
def test_impossible_joins_are_refused(change: dict[str, Any], text: str) -> None:
    """A join names a job, a place in it, and how long it waits."""
    join = Join(1, "j", Peer(0), 2, 1.0, 1.0)
    assert validated(join) is join
    _refusal(replace(join, **change), text)


def test_a_contribution_has_a_number() -> None:
    """They count from 1: one of number 0 was taken for a repetition, and never answered."""
    call = Call(Operation.BARRIER, _PLAIN, PlainSignature())
    refusal = _refusal(
        Contribute(1, 1, 0, call, None), "^expected the number of a contribution, 1 or more, received 0$"
    )
    assert refusal.call is call


@pytest.mark.parametrize(
    ("name", "received"),
    [("", "''"), ("x" * 201, "'" + "x" * 60 + "'… of 201 characters"), ("x" * 10**6, "'x{60}'… of 10")],
)
def test_a_push_and_a_pull_name_a_layer_as_everybody_does(name: str, received: str) -> None:
    """A name of a million characters was taken, kept and written."""
    for event in (Push(1, name, _STATE), Pull(1, name)):
        _refusal(event, f"^expected a layer name of 1 to 200 characters, received {received}")
    assert validated(Pull(1, "x" * 200)) == Pull(1, "x" * 200)


def test_a_push_of_another_arithmetic_is_refused() -> None:
    """Of a dtype that is none it was a fault of the service."""
    state = replace(
        _STATE, forward=replace(_STATE.forward, dtype="foo"), backward=replace(_STATE.backward, dtype="foo")
    )
    _refusal(Push(1, "a", state), "^expected a state in float32 or float64, received 'foo'$")
