"""Encoding of calls under MPI: equal calls give equal texts, different calls different ones."""

import numpy as np
import pytest

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnworker.transports.call_encoding import MirrorSignature, decode_call, encode_call, fingerprint_of, pushed_digest

SIGNATURE = LayerSignature(4, "float32", 0.99, 1e-3, masked=True, grid=2**63 - 1)
CALLS = [
    Call(Operation.SUMS, ExchangeKey("bn", Direction.FORWARD, 3), SIGNATURE, 1),
    Call(Operation.SUMS, ExchangeKey("bn", Direction.BACKWARD, 3), SIGNATURE, 1),
    Call(Operation.SUMS, ExchangeKey("bn", Direction.BACKWARD, 3), SIGNATURE, 1, 3),
    Call(Operation.SUMS, ExchangeKey("bn", Direction.BACKWARD, 3), SIGNATURE, 1, 2),
    Call(Operation.SUMS, ExchangeKey("bn", Direction.FORWARD, 4), SIGNATURE, 1),
    Call(Operation.SUMS, ExchangeKey("b2", Direction.FORWARD, 3), SIGNATURE, 1),
    Call(Operation.SUMS, ExchangeKey("bn", Direction.FORWARD, 3), SIGNATURE, 0),
    Call(Operation.PROBE, ExchangeKey("bn", Direction.FORWARD, 3), SIGNATURE, 1),
    Call(Operation.ENROLL, ExchangeKey("bn", None, 0), LayerSignature(4, "float64", 0.9, 1e-5)),
    Call(
        Operation.ENROLL,
        ExchangeKey("bn", None, 0),
        LayerSignature(4, "float32", 0.9, 1e-5, renorm=Renorm(0.5, dmax=1.0)),
    ),
    Call(Operation.REDUCE, ExchangeKey(None, None, 7), PlainSignature("sum", ("float32[3, 4]", "int8[]"))),
    Call(Operation.BROADCAST, ExchangeKey(None, None, 7), PlainSignature(root=1)),
    Call(Operation.BARRIER, ExchangeKey(None, None, 7), PlainSignature()),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_round_trips(call: Call) -> None:
    """Every part of a call comes back; a layer's signature also with what only a mirror adds."""
    got = decode_call(encode_call(call, "(6, 4)", "1 (0123abcd)"))
    assert got._replace(signature=call.signature) == call
    if isinstance(call.signature, PlainSignature):
        assert got.signature == call.signature
    else:
        assert isinstance(got.signature, MirrorSignature)
        assert (got.signature.shape, got.signature.pushed) == ("(6, 4)", "1 (0123abcd)")
        assert all(getattr(got.signature, name) == getattr(call.signature, name) for name in LayerSignature.__slots__)


def test_different_calls_have_different_names() -> None:
    """Also where only the shape or what was pushed differs; no name is that of a leaving rank, 0."""
    items = [encode_call(call) for call in CALLS] + [
        encode_call(CALLS[0], "(6, 4)"),
        encode_call(CALLS[0], "", "1 (0123abcd)"),
    ]
    names = [fingerprint_of(text) for text in items]
    assert len(set(names)) == len(names)
    assert all(0 < name <= 2**62 for name in names)
    assert fingerprint_of(b"bn") == 4375063525963678276, "the same on every machine"


def test_spelling_does_not_matter() -> None:
    """1 and 1.0, NumPy's numbers and Python's are the same value."""
    a = LayerSignature(4, "float32", 1, 1e-3)
    b = LayerSignature(np.int64(4), "float32", np.float64(1.0), np.float64(1e-3))  # type: ignore[arg-type]  # as users do
    key = ExchangeKey("bn", Direction.FORWARD, 0)
    assert encode_call(Call(Operation.PROBE, key, a)) == encode_call(Call(Operation.PROBE, key, b))


def test_pushes_are_counted_and_named() -> None:
    """Two mirrors speak alike after the same pushes in the same order, and only then."""

    def state(mean: float) -> LayerState:
        moving = Moving(np.full(2, mean, np.float32), np.ones(2, np.float32))
        return LayerState(moving, Grid.unknown("float32", 2), BackwardGrid.unknown("float32", 2))

    once, other = pushed_digest("nothing", state(1)), pushed_digest("nothing", state(2))
    assert once == pushed_digest("nothing", state(1))
    assert once.startswith("1 (")
    assert once != other
    twice = pushed_digest(once, state(2))
    assert twice.startswith("2 (")
    assert twice != pushed_digest(other, state(1))
