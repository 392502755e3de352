"""Grids: found by probes, kept while they fit, named by a fingerprint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer.exchange import BackwardExchange
from bnlayer.gradients import GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.moments import BatchStatistics, Moments
from bnlayer.moving import Moving
from bnlayer.precision import DOUBLE, SINGLE, exponent_above, precision_of
from bnlayer.state import LayerState


def moments_of(x: NDArray[np.float32], grid: Grid) -> Moments:
    """A shard's moments."""
    return Moments(reference.moments(x, None, grid), grid)


def probed(values: list[float], dtype: str = "float32") -> Grid:
    """The grid that a probe of one channel finds."""
    unknown = Grid.unknown(dtype, 1)
    x = np.array(values, dtype).reshape(-1, 1, 1)
    return unknown.probed(reference.probe(x, None, unknown), np.array([True]))


@pytest.mark.parametrize("precision", [SINGLE, DOUBLE])
def test_keys_order_as_the_floats_do(precision: object) -> None:
    """−Inf < negative < −0 < +0 < positive < Inf, and back."""
    assert isinstance(precision, type(SINGLE))
    x = np.array([-np.inf, -1e30, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1e30, np.inf], precision.dtype)
    keys = precision.key(x)
    assert (np.diff(keys) > 0).all()
    assert precision.unkey(keys).tobytes() == x.astype(np.float64).tobytes()
    assert keys[0] == precision.no_key


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_a_probed_window_holds_the_data_with_room(values: list[float]) -> None:
    """Every |x − pivot| lies in the window, 8-fold unless at the limits; −0 never shows in the pivot."""
    grid = probed(values)
    assert grid.is_probed
    assert not (grid.pivot_C[0] == 0 and np.signbit(grid.pivot_C[0]))
    d = np.abs(np.array(values, np.float32).astype(np.float64) - grid.pivot_C[0])
    if d.max() == 0:
        assert grid.exponent_C[0] == -160
    elif grid.exponent_C[0] < 126:
        assert (d * 4 < grid.window_C[0]).all()


@pytest.mark.parametrize(
    ("values", "pivot"),
    [([-1.0, 5.0], 0.0), ([0.0, 5.0], 0.0), ([-5.0, -0.0], 0.0), ([1.0, 5.0], 3.0), ([-5.0, -1.0], -3.0)],
)
def test_values_on_both_sides_of_0_are_their_own_deviations(values: list[float], pivot: float) -> None:
    """The window holds the larger side then; elsewhere the pivot is the middle."""
    grid = probed(values)
    assert (grid.pivot_C[0], np.signbit(grid.pivot_C[0])) == (pivot, pivot < 0)
    assert grid.window_C[0] == (256.0 if pivot == 0 else 128.0)


def test_channels_without_a_value_or_a_need_keep_their_grid() -> None:
    """Masked out, not finite, or simply not asked."""
    grid = probed([1.0, 5.0])
    nothing = np.array([[SINGLE.no_key], [SINGLE.no_key]])
    after = grid.probed(nothing, np.array([True]))
    assert (after.pivot_C[0], after.exponent_C[0]) == (3.0, grid.exponent_C[0])
    keys = reference.probe(np.array([[[9.0]]], np.float32), None, grid)
    assert grid.probed(keys, np.array([False])).pivot_C[0] == 3.0
    assert grid.probed(keys, np.array([True])).pivot_C[0] == 9.0


def test_float64_extremes_do_not_overflow() -> None:
    """The middle of the largest numbers, and a window that is capped."""
    grid = probed([-1.7e308, 1.7e308], "float64")
    assert (grid.pivot_C[0], grid.exponent_C[0]) == (0.0, 500)


def test_fingerprints_tell_grids_apart() -> None:
    """Adding words of different grids would be silently wrong."""
    one, other = probed([0.0, 1.0]), probed([0.0, 100.0])
    assert one.fingerprint == probed([0.0, 1.0]).fingerprint != other.fingerprint
    assert 0 <= one.fingerprint < 2**63
    x = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="Moments of different grids can't be added"):
        _ = moments_of(x, one) + moments_of(x, other)
    two = moments_of(x, one) + moments_of(x, one)
    assert two.count_C.tolist() == [2]
    back, need = BackwardGrid.unknown("float32", 1), np.array([True])
    assert back.probed(np.array([[0], [3]]), need).fingerprint != back.probed(np.array([[0], [4]]), need).fingerprint


def test_a_raised_deviation_stays_until_the_forward_grid_changes() -> None:
    """Masked values may lie outside the reach of the unmasked ones: one probe must serve many steps."""
    reach = np.array([2])
    grid, statistics = BackwardGrid.unknown("float32", 1), SimpleNamespace(reach=reach)
    exchange = BackwardExchange.begin(grid, cast("BatchStatistics", statistics))
    raised = grid.probed(exchange.beyond_reach(np.array([[0], [40]])), np.array([True]))
    assert raised.reaching(reach).deviation_C.tolist() == [40]
    assert raised.renewed(np.array([True])).reaching(reach).deviation_C.tolist() == [2]
    explained = grid.probed(exchange.beyond_reach(np.array([[0], [2]])), np.array([True]))
    assert explained.deviation_C.tolist() == [-160]


def test_exponents_bound_from_above() -> None:
    """a < 2^e ≤ 2a, at every power of two and beside it (float32's log2 was wrong at most of them)."""
    powers = np.ldexp(1.0, np.arange(-1000, 1000))
    for a in (powers, np.nextafter(powers, 0), np.nextafter(powers, np.inf)):
        e = exponent_above(a, -9999)
        assert (a < np.ldexp(1.0, e)).all()
        assert (np.ldexp(1.0, e) <= 2 * a).all()
    assert exponent_above(np.array([0.0]), -7).tolist() == [-7]


def test_unknown_dtypes_have_no_arithmetic() -> None:
    """Only float32 and float64 do."""
    with pytest.raises(ValueError, match="Expected float32 or float64 for the arithmetic, received float16"):
        precision_of("float16")


def test_moments_read_back_what_was_packed() -> None:
    """Mean and variance of a few numbers, by hand."""
    grid = probed([1.0, 2.0, 6.0])
    moments = moments_of(np.array([1.0, 2.0, 6.0], np.float32).reshape(3, 1, 1), grid)
    assert moments.limbs.shape == (Moments.rows(1), 1) == (6, 1)
    a, variance = moments.mean_variance
    assert grid.pivot_C + a == pytest.approx([3.0])
    assert variance == pytest.approx([14 / 3])
    assert GradientSums.rows(2) == 10


def test_states_round_trip_as_arrays() -> None:
    """And a damaged one is refused by name."""
    grid = probed([1.0, 2.0])
    moving = Moving(np.zeros(1, np.float32), np.ones(1, np.float32))
    state = LayerState(moving, grid, BackwardGrid.unknown("float32", 1), version=7)
    arrays = state.arrays()
    restored = LayerState.from_arrays(arrays, "float32")
    assert {k: v.tobytes() for k, v in restored.arrays().items()} == {k: v.tobytes() for k, v in arrays.items()}
    assert (restored.version, restored.forward.is_probed, restored.backward.is_probed, restored.channels) == (
        7,
        True,
        False,
        1,
    )
    with pytest.raises(ValueError, match=r"The state of a layer lacks 'forward\.pivot'; it has"):
        LayerState.from_arrays({k: v for k, v in arrays.items() if k != "forward.pivot"}, "float32")
    with pytest.raises(ValueError, match="lacks 'moving_mean'; it has nothing"):
        LayerState.from_arrays({}, "float32")
    with pytest.raises(ValueError, match=r"expected 'moving_variance' of shape \(1,\) and dtype float32, received"):
        LayerState.from_arrays({**arrays, "moving_variance": np.zeros(2)}, "float32")
    with pytest.raises(ValueError, match=r"dtype int64, received shape \(1,\) and dtype float64"):
        LayerState.from_arrays({**arrays, "forward.exponent": np.zeros(1)}, "float32")
