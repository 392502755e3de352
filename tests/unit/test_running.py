"""Exact moments in one process; over ranks they are part of every transport's contract."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnlayer
from bnlayer import RunningMoments

_FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(_FINITE, min_size=1, max_size=12), st.randoms())
def test_moments_are_the_exact_ones_rounded_once(values: list[float], order: object) -> None:
    """By rational arithmetic, whatever the size of the values; in any order, and in any two parts."""
    n, exact = len(values), [Fraction(v) for v in values]
    mean = sum(exact) / n
    variance = sum((v - mean) ** 2 for v in exact) / n
    got = bnlayer.moments(np.array(values))
    assert got.count == n
    assert got.mean == float(mean)
    assert got.variance == (float(variance) if variance < Fraction(2) ** 1024 - 2**970 else np.inf)
    order.shuffle(values)  # type: ignore[attr-defined]
    parts = [RunningMoments(), RunningMoments()]
    for part, some in zip(parts, (values[: n // 2], values[n // 2 :]), strict=True):
        part.update(np.array(some))
    both = parts[1] + parts[0]
    assert (both.mean, both.variance) == (got.mean, got.variance)
    restored = RunningMoments()
    restored.load_state_dict(both.state_dict())
    assert restored == both


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_integers_are_exact_beyond_float64(values: list[int]) -> None:
    """int64 has more digits than a float64."""
    mean = Fraction(sum(values), len(values))
    got = bnlayer.moments(np.array(values, np.int64))
    assert got.mean == float(mean)
    assert got.variance == float(sum((v - mean) ** 2 for v in map(Fraction, values)) / len(values))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (1, 2), None])
def test_axes_are_numpys(axis: int | tuple[int, ...] | None) -> None:
    """What is reduced, and the shape that remains; bfloat16 and float16 are what they stand for."""
    x = np.random.default_rng(0).normal(5, 2, (4, 3, 6)).astype(np.float32)
    count, mean, variance = bnlayer.moments(x, axis)
    wide = x.astype(np.float64)
    assert count.shape == mean.shape == np.mean(x, axis).shape
    assert (count == x.size // max(1, mean.size)).all()
    np.testing.assert_allclose(mean, wide.mean(axis), rtol=1e-14)
    np.testing.assert_allclose(variance, wide.var(axis), rtol=1e-13)
    mask = np.arange(x.size).reshape(x.shape) % 5 > 0
    np.testing.assert_allclose(bnlayer.moments(x, axis, mask).mean, wide.mean(axis, where=mask), rtol=1e-14)
    half = bnlayer.moments(x.astype(np.float16), axis)
    np.testing.assert_allclose(half.mean, x.astype(np.float16).astype(np.float64).mean(axis), rtol=1e-14)


def test_nothing_and_not_finite() -> None:
    """No value: NaN and a count of 0. A value that is not finite: NaN in its channel alone."""
    empty = bnlayer.moments(np.zeros((0, 2)), 0)
    assert (empty.count == 0).all() and np.isnan(empty.mean).all() and np.isnan(empty.variance).all()
    x = np.array([[1.0, np.inf], [3.0, 1.0]])
    got = bnlayer.moments(x, 0)
    assert got.mean[0] == 2.0 and np.isnan(got.mean[1])
    assert bnlayer.moments(x, 0, np.isfinite(x)).mean.tolist() == [2.0, 1.0]
    seen = RunningMoments(2)
    assert np.isnan(seen.mean).all() and (seen.count == 0).all()


def test_errors_name_what_was_expected() -> None:
    """Axes, masks, shapes, dtypes and states."""
    with pytest.raises(ValueError, match=r"axis=2 is out of bounds for x of shape \(2, 3\)"):
        bnlayer.moments(np.zeros((2, 3)), 2)
    with pytest.raises(ValueError, match="The mask does not broadcast to x"):
        bnlayer.moments(np.zeros((2, 3)), 0, np.ones(2, bool))
    with pytest.raises(TypeError, match="a real dtype, received dtype complex128"):
        bnlayer.moments(np.zeros(2, complex))
    seen = RunningMoments(3)
    with pytest.raises(ValueError, match=r"expected rows of shape \(3,\), \(n, …\), received shape \(3,\)"):
        seen.update(np.zeros(3))
    with pytest.raises(ValueError, match="missing squares, squares_begins, sum, sum_begins"):
        seen.load_state_dict({"count": np.zeros(3)})
    with pytest.raises(ValueError, match="expected the history of rows of 3 values, received 2"):
        seen.load_state_dict(RunningMoments(2).state_dict())
    with pytest.raises(ValueError, match=r"Rows of shape \(3,\) and \(2,\) can't be added"):
        seen + RunningMoments(2)
