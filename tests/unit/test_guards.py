"""The small terms of the arithmetic, each shown by the case that needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Operation
from bnlayer.grid import Grid
from bnlayer.kernels import reference
from bnlayer.moments import Moments
from support.layers import gradients
from support.ranks import Meeting, SimulatedRank, run_all
from support.truth import evaluate

VALUES = st.floats(-1e6, 1e6, width=32)


def moments_of(x: NDArray[np.floating], grid: Grid) -> Moments:
    """A shard's moments."""
    return Moments(reference.moments(x, None, grid), grid)


def grid_of(*values: float, dtype: str = "float32") -> Grid:
    """The grid that a probe of these values finds."""
    unknown = Grid.unknown(dtype, 1)
    return unknown.probed(reference.probe(column(*values, dtype=dtype), None, unknown), np.array([True]))


def column(*values: float, dtype: str = "float32") -> NDArray[Any]:
    """One channel, as the kernels see it."""
    return np.array(values, dtype).reshape(-1, 1, 1)


def probes_after_the_first_step(batches: list[NDArray[Any]], gradients_of: list[NDArray[Any]]) -> list[str]:
    """The directions in which one rank probed in the steps after the first."""
    meeting = Meeting(1)

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        for x, dy in zip(batches, gradients_of, strict=True):
            bn(x, training=True)
            bn.backward(dy)

    run_all(meeting, body)
    return [str(c.key.direction) for c in meeting.calls if c.operation is Operation.PROBE and c.key.step > 0]


@given(values=st.lists(VALUES, min_size=2, max_size=2), constant=VALUES, count=st.integers(1, 5))
def test_the_variance_of_a_constant_is_never_negative(values: list[float], constant: float, count: int) -> None:
    """Off the pivot T/N − a² rounds to either side of 0."""
    moments = moments_of(column(*[constant] * count), grid_of(*values))
    if not moments.out_of_range_C[0]:
        assert moments.mean_variance[1][0] >= 0


@given(
    window=st.lists(VALUES, min_size=2, max_size=2),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 1e-6, 1e-20, 1e-38]),
    masked=st.booleans(),
)
def test_every_counted_value_lies_within_reach(
    window: list[float], values: list[float], scale: float, masked: bool
) -> None:
    """|x − pivot| < 2^reach, also for data far below the unit of the grid, whose computed variance is 0."""
    x = column(*(v * scale for v in values))
    moments = moments_of(x, grid_of(*window))
    if moments.out_of_range_C[0]:
        return
    statistics = moments.statistics(1e-3, masked)
    farthest = np.abs(x.astype(np.float64) - float(statistics.pivot[0])).max()
    assert farthest < np.ldexp(1.0, max(int(statistics.reach[0]), -148))


@pytest.mark.parametrize(("value", "refused"), [(1.5, False), (29.0, True)])
def test_a_mean_far_from_the_pivot_needs_a_finer_grid(value: float, refused: bool) -> None:
    """The rounding of deviations makes a² wrong by |a|·u1, beside an epsilon that u2 would do for."""
    grid = Grid("float32", np.array([1.0]), np.array([5]), True)
    moments = moments_of(column(value, value), grid)
    _, channels = moments.check_window(1e-5, False)
    assert (channels is not None) == refused


def test_grids_that_differ_in_the_pivot_alone_have_other_names() -> None:
    """Their words would add up to nonsense."""
    one, other = grid_of(10, 11), grid_of(1000, 1001)
    assert one.exponent_C.tolist() == other.exponent_C.tolist()
    assert one.fingerprint != other.fingerprint


def test_a_single_masked_in_value_has_keras_variance() -> None:
    """N/(N + 1e-7) pulls the mean towards 0: at mean 1e6 that alone is a variance of 0.01."""
    bn = BatchNormalization(momentum=0.0, dtype="float64")
    bn(np.array([[1e6], [3.0]]), training=True, mask=np.array([True, False]))
    mean = 1e6 / (1 + 1e-7)
    assert bn.moving_mean.value[0] == pytest.approx(mean, rel=1e-14)
    assert bn.moving_variance.value[0] == pytest.approx((1e6 - mean) ** 2 / (1 + 1e-7), rel=1e-6)


def test_gradients_may_grow_a_hundredfold_without_a_probe() -> None:
    """Eight bits of room: a probe a step would double the exchanges of every unsteady run."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 2)).astype(np.float32)
    dys = [rng.standard_normal((64, 2)) * scale for scale in (1.0, 10.0, 50.0, 0.01)]
    assert probes_after_the_first_step([x] * 4, dys) == []
    assert probes_after_the_first_step([x] * 2, [dys[0], dys[0] * 1e4]) == ["backward"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vanishing_gradients_keep_their_digits(dtype: str) -> None:
    """A gradient 1e-12 of the first: on the old grid nothing would be left of it."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((50, 3)).astype(dtype), rng.standard_normal((50, 3)).astype(dtype)
    bn = BatchNormalization(dtype=dtype)
    for scale in (1.0, 1e-12):
        bn(x, training=True)
        dx = bn.backward(dy * np.dtype(dtype).type(scale))
        want = evaluate(x, dy * np.dtype(dtype).type(scale))
        bound = 2e-6 if dtype == "float32" else 1e-10
        assert float(np.abs(dx - want.dx).max() / np.abs(want.dx).max()) <= bound
        assert float(np.abs(gradients(bn)[1] - want.beta).max() / np.abs(want.dx).max()) <= 50 * bound


def test_a_nonfinite_channel_asks_for_no_probe_whatever_else_it_holds() -> None:
    """NaN beside a value outside the window, in x and in dy: a probe each step would be paid for nothing."""
    rng = np.random.default_rng(0)
    good = rng.standard_normal((8, 2)).astype(np.float32)
    spoiled = good.copy()
    spoiled[0, 0], spoiled[1, 0] = np.nan, 1e9
    assert probes_after_the_first_step([good, spoiled, spoiled], [good] * 3) == []
    assert probes_after_the_first_step([good] * 3, [good, spoiled, spoiled]) == []
    assert probes_after_the_first_step([good, spoiled], [good, good * np.float32(1e9)]) == ["backward"]
    factors = np.array([1e9, 1], np.float32)  # large gradients of the nonfinite channel alone
    assert probes_after_the_first_step([good, spoiled], [good, good * factors]) == []


def test_moments_of_two_folds_are_exact() -> None:
    """S and T of float64 data, against fractions, where one fold would keep 52 bits of the window alone."""
    from fractions import Fraction

    values = [1e8, -1e8, 1.0 + 2**-40, 3e-9]
    grid = grid_of(*values, dtype="float64")
    moments = moments_of(column(*values, dtype="float64"), grid)
    assert moments.limbs.shape[0] == Moments.rows(2)
    a, variance = moments.mean_variance
    exact = [Fraction(v) - Fraction(float(grid.pivot_C[0])) for v in values]
    mean = sum(exact) / 4
    assert float(a[0]) == pytest.approx(float(mean), rel=1e-15)
    assert float(variance[0]) == pytest.approx(float(sum(d * d for d in exact) / 4 - mean * mean), rel=1e-15)


def test_squares_are_exact_far_from_the_pivot() -> None:
    """float64 data a million standard deviations off the pivot: d·d rounded to 53 bits would leave 7 digits of V."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    bn = BatchNormalization(dtype="float64", momentum=0.0)
    bn(np.array([[-1.0], [1.0]]), training=True)
    x = 0.9 + 1e-6 * rng.standard_normal((64, 1))
    bn(x, training=True)
    exact = [Fraction(float(v)) for v in x[:, 0]]
    mean = sum(exact) / 64
    variance = float(sum((v - mean) ** 2 for v in exact) / 64)
    assert bn.moving_variance.value[0] == pytest.approx(variance, rel=1e-9, abs=0)


def test_masked_outliers_without_a_gradient_ask_for_no_probe() -> None:
    """A huge value under a False mask matters to the backward grid only where its dy is not 0."""
    rng = np.random.default_rng(0)
    meeting = Meeting(1)

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        for step in range(3):
            x, dy = rng.standard_normal((16, 2)), rng.standard_normal((16, 2))
            x[3] = 10.0 ** (5 + 3 * step)
            dy[3] = 0
            bn(x, training=True, mask=np.arange(16) != 3)
            bn.backward(dy)

    run_all(meeting, body)
    assert [c.key.step for c in meeting.calls if c.operation is Operation.PROBE] == [0, 0]


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_about_zero_keep_their_digits_far_from_the_mean(masked: bool) -> None:
    """Data 100 deviations from 0, on a grid whose pivot is 0: products are summed about 0, not the mean."""
    rng = np.random.default_rng(0)
    bn = BatchNormalization()
    bn.vjp((100 * rng.standard_normal((64, 3))).astype(np.float32), training=True)
    x, dy = (100 + rng.standard_normal((4096, 3))).astype(np.float32), rng.standard_normal((4096, 3)).astype(np.float32)
    mask = rng.random(4096) < 0.5 if masked else None
    bn(x, training=True, mask=mask)
    assert (bn.state.forward.pivot_C == 0).all()
    dx = bn.backward(dy)
    want = evaluate(x, dy, None if mask is None else mask[:, None])
    assert float(np.abs(dx - want.dx).max() / np.abs(want.dx).max()) <= 2e-6
    assert float(np.abs(gradients(bn)[0] - want.gamma).max() / np.abs(dy).sum(0).max()) <= 2.0**-24
