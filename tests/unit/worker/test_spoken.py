"""What ranks say over MPI: the same text for the same belief, another for another."""

import numpy as np
import pytest

from bnlayer.collective import Call, Direction, LayerTerms, Operation, Place, PlainTerms
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnworker.transports.spoken import MirrorTerms, heard, name_of, pushed_state, speak

TERMS = LayerTerms(4, "float32", 0.99, 1e-3, masked=True, grid=2**63 - 1)
CALLS = [
    Call(Operation.SUMS, Place("bn", Direction.FORWARD, 3), TERMS, 1),
    Call(Operation.SUMS, Place("bn", Direction.BACKWARD, 3), TERMS, 1),
    Call(Operation.SUMS, Place("bn", Direction.FORWARD, 4), TERMS, 1),
    Call(Operation.SUMS, Place("b2", Direction.FORWARD, 3), TERMS, 1),
    Call(Operation.SUMS, Place("bn", Direction.FORWARD, 3), TERMS, 0),
    Call(Operation.PROBE, Place("bn", Direction.FORWARD, 3), TERMS, 1),
    Call(Operation.ENROLL, Place("bn", None, 0), LayerTerms(4, "float64", 0.9, 1e-5)),
    Call(Operation.ENROLL, Place("bn", None, 0), LayerTerms(4, "float32", 0.9, 1e-5, renorm=Renorm(0.5, dmax=1.0))),
    Call(Operation.REDUCE, Place(None, None, 7), PlainTerms("sum", ("float32[3, 4]", "int8[]"))),
    Call(Operation.BROADCAST, Place(None, None, 7), PlainTerms(root=1)),
    Call(Operation.BARRIER, Place(None, None, 7), PlainTerms()),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_survives_the_way(call: Call) -> None:
    """Every part of a call comes back; a layer's terms with the two beliefs of a mirror."""
    got = heard(speak(call, "(6, 4)", "1 (0123abcd)"))
    assert (got.operation, got.place, got.attempt) == (call.operation, call.place, call.attempt)
    if isinstance(call.terms, PlainTerms):
        assert got.terms == call.terms
    else:
        assert isinstance(got.terms, MirrorTerms)
        assert (got.terms.shape, got.terms.pushed) == ("(6, 4)", "1 (0123abcd)")
        assert all(getattr(got.terms, name) == getattr(call.terms, name) for name in LayerTerms.__slots__)


def test_different_calls_have_different_names() -> None:
    """Also where only the shape or what was pushed differs; no name is that of a leaving rank, 0."""
    said = [speak(call) for call in CALLS] + [speak(CALLS[0], "(6, 4)"), speak(CALLS[0], "", "1 (0123abcd)")]
    names = [name_of(text) for text in said]
    assert len(set(names)) == len(names)
    assert all(0 < name <= 2**62 for name in names)
    assert name_of(b"bn") == 4375063525963678276, "the same on every machine"


def test_spelling_does_not_matter() -> None:
    """1 and 1.0, NumPy's numbers and Python's are the same belief."""
    a = LayerTerms(4, "float32", 1, 1e-3)
    b = LayerTerms(np.int64(4), "float32", np.float64(1.0), np.float64(1e-3))  # type: ignore[arg-type]  # as users do
    place = Place("bn", Direction.FORWARD, 0)
    assert speak(Call(Operation.PROBE, place, a)) == speak(Call(Operation.PROBE, place, b))


def test_pushes_are_counted_and_named() -> None:
    """Two mirrors speak alike after the same pushes in the same order, and only then."""

    def state(mean: float) -> LayerState:
        moving = Moving(np.full(2, mean, np.float32), np.ones(2, np.float32))
        return LayerState(moving, Grid.unknown("float32", 2), BackwardGrid.unknown("float32", 2))

    once, other = pushed_state("nothing", state(1)), pushed_state("nothing", state(2))
    assert once == pushed_state("nothing", state(1))
    assert once.startswith("1 (")
    assert once != other
    twice = pushed_state(once, state(2))
    assert twice.startswith("2 (")
    assert twice != pushed_state(other, state(1))
