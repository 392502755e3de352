"""What follows from the sums, in NumPy: the statistics of a batch, the moving update, the coefficients of the passes.

Part of the reference kernel set: the oracle of the compiled functions of the same names
(`native/kernels/channels.cpp`), and what computes float64 layers.

Shape suffixes: C channels, W limbs (`bnlayer.limbs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import rounded
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.results import BatchStatistics, Gradients
from bnlayer.limbs import as_float, counted, two_folds
from bnlayer.precision import exponent_above, power_of_two

_SAMPLES = 64

Array = NDArray[Any]
Doubles = NDArray[np.float64]


def mean_variance(limbs: NDArray[np.int64], grid: Grid) -> tuple[Doubles, Doubles]:
    """The mean deviation from the pivot and the biased variance, each (C,) float64; 0 without a value.

    a = S·u1/N        V = max(T·u2/N − a², 0)
    """
    n = np.maximum(limbs[-2], 1)
    if grid.precision.folds == 2:
        return _mean_variance_exact(limbs, grid, n)
    a = as_float(*limbs[0:2]) * grid.unit1_C / n
    second = as_float(*limbs[2:4]) * grid.unit2_C / n
    return a, np.maximum(second - a * a, 0.0)


def _mean_variance_exact(limbs: NDArray[np.int64], grid: Grid, n: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """The same for two folds, in integers, rounded once at the end: T·N − S² cancels too much for floats."""
    # The second folds are in units 2^52 (deviations) and 2^51 (squares) finer: both end at exponent − 103.
    s = two_folds(limbs[0:4], 52)
    t = two_folds(limbs[4:8], 51)
    w, counts = grid.exponent_C, n.tolist()
    a = np.array([si / ni for si, ni in zip(s, counts, strict=True)])
    spread = [max((ti * ni << 103) - si * si, 0) / (ni * ni << 103) for si, ti, ni in zip(s, t, counts, strict=True)]
    return np.ldexp(a, w - 103), np.ldexp(np.array(spread), 2 * w - 103)


@np.errstate(all="ignore")  # Inf and NaN are answers here, on the owner as on the ranks
def statistics(
    limbs: NDArray[np.int64], grid: Grid, epsilon: float, e: float
) -> tuple[BatchStatistics, NDArray[np.bool_] | None]:
    """The batch's statistics, and the channels that need a new grid.

    δ = (pivot + a)·e/D        μ = pivot + a − δ        v = (V + δ²)·N/D

    A channel is refused where a value lies outside its window; or where the window has become too coarse for the
    spread: V + ε < max(u2, |a|·u1/2)·min(2^22, 2^42/N). A nonfinite channel asks for no grid: it stays so on any.

    Args:
        limbs: (W, C), reduced.
        grid: what they are in units of.
        epsilon: added to the variance before the root.
        e: 1e-7 with a mask, else 0.

    Returns:
        The statistics, and the channels that are refused, (C,) bool; None if none is.
    """
    precision, w = grid.precision, grid.exponent_C
    a, spread = mean_variance(limbs, grid)
    count = limbs[-2]
    out_of_range, not_finite = counted(limbs[-1])
    some, n = np.maximum(count, 1), count.astype(np.float64)
    # T is wrong by half a unit a term at most, a by half of u1, which makes a² wrong by |a|·u1: together less than
    # 2^-20 of V + ε. Many terms' roundings average out far below it.
    needed = np.maximum(grid.unit2_C, np.abs(a) * grid.unit1_C / 2) * np.minimum(2.0**22, 2.0**42 / some)
    coarse = (spread + epsilon < needed) & (w > precision.lowest) & (count > 0)
    refused = (out_of_range | coarse) & ~not_finite
    divisor = np.where(n + e > 0, n + e, 1.0)
    center = grid.pivot_C + a
    delta = center * (e / divisor)
    mean = center - delta
    variance = (spread + delta * delta) * (n / divisor)
    rounded_mean = mean.astype(precision.dtype)
    residual = ((grid.pivot_C - rounded_mean.astype(np.float64)) + a) - delta
    farthest = np.sqrt(n * (spread + 128.0 * grid.unit2_C))  # from the mean without e
    from_mean = exponent_above(farthest + np.abs(delta) + precision.epsilon * np.abs(mean), precision.lowest) + 1
    from_zero = exponent_above(farthest + np.abs(a), precision.lowest) + 1
    about_zero = (grid.pivot_C == 0) & (precision.folds == 1)
    rows = np.stack(
        [
            n, divisor, mean, variance, 1.0 / np.sqrt(variance + epsilon), residual, mean * (e / divisor),
            np.where(about_zero, mean, residual),
        ]
    )  # fmt: skip
    statistics = BatchStatistics(
        rows,
        rounded_mean,
        np.where(about_zero, 0, rounded_mean).astype(precision.dtype),
        np.where(about_zero, np.minimum(w, from_zero), from_mean),
        not_finite | out_of_range,
    )
    return statistics, refused if refused.any() else None


@np.errstate(all="ignore")
def moved(
    statistics: BatchStatistics,
    old_mean: Array,
    old_variance: Array,
    momentum: float,
    *,
    synchronized: bool,
    masked: bool,
    unbiased: bool = False,
) -> tuple[Array, Array]:
    """The moving mean and variance after a batch, in their dtypes.

        old · momentum + batch · (1 − momentum)        in float64, rounded once

    Which channels are left alone: see `bnlayer.moving.update`.
    """
    if unbiased:
        statistics = with_unbiased_variance(statistics)
    count, mean, variance = statistics.count, statistics.mean, statistics.variance
    if not synchronized:
        mean, variance = (np.where(statistics.nonfinite, np.nan, batch) for batch in (mean, variance))
    to_mean, to_variance = towards(old_mean, mean, momentum), towards(old_variance, variance, momentum)
    if synchronized:
        apply = (count > 0) & ~statistics.nonfinite & np.isfinite(to_mean) & np.isfinite(to_variance)
    else:
        apply = (count > 0) | masked
    return np.where(apply, to_mean, old_mean), np.where(apply, to_variance, old_variance)


def with_unbiased_variance(statistics: BatchStatistics) -> BatchStatistics:
    """The statistics with v·N/(N − 1) for the variance; a channel of one value counts as one without a value."""
    several = statistics.count > 1
    rows = statistics.rows.copy()
    rows[0] = np.where(several, statistics.count, 0.0)
    rows[3] = statistics.variance * (rows[0] / np.where(several, statistics.count - 1.0, 1.0))
    return statistics._replace(rows=rows)


def sample(x: NDArray[Any]) -> bytes:
    """Some 64 values of a batch, spread over its rows and channels, to detect writes to it; all, if there are few.

    In-place operations nearly always write to all of it. The stride is odd: an even one would hit the same channels in
    each row.
    """
    flat = x.ravel() if x.flags.c_contiguous else x.flat
    return flat[:: x.size // _SAMPLES | 1].tobytes()


def towards(old: Array, batch: Doubles, momentum: float) -> Array:
    """`old` moved towards a batch's value, in its dtype."""
    return rounded(unrounded(old, batch, momentum), old.dtype)


def unrounded(old: Array, batch: Doubles, momentum: float) -> Doubles:
    """The same in float64."""
    return np.asarray(old.astype(np.float64) * momentum + batch * (1.0 - momentum))


@np.errstate(all="ignore")
def coefficients(
    statistics: BatchStatistics, gamma: Array | None, beta: Array | None, dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """γs and β − residual·γs, in a dtype; None: there is no γ, or no β."""
    scale = statistics.inverse_std if gamma is None else gamma.astype(np.float64) * statistics.inverse_std
    shift = (0.0 if beta is None else beta.astype(np.float64)) - statistics.residual * scale
    return scale.astype(dtype), shift.astype(dtype)


@np.errstate(all="ignore")
def gradients(
    limbs: NDArray[np.int64], grid: BackwardGrid, forward: BatchStatistics
) -> tuple[Gradients, NDArray[np.bool_] | None]:
    """The gradients of gamma and beta, the coefficients of the input gradient, and the channels that need a new grid.

        B' = B − A·(μ − p)        k = s²·B'/D        c1 = A/D − k·(r + μ·e/D)        dγ = s·B'        dβ = A

    A channel is refused where a value lies outside its window; or where its gradients have become too small for it,
    so that too few bits of them remain.

    Args:
        limbs: (W, C), reduced.
        grid: what they are in units of.
        forward: of the training call whose outputs the gradients belong to.

    Returns:
        The gradients, and the channels that are refused, (C,) bool; None if none is.
    """
    _, divisor, _, _, s, residual, mean_share, pivot_residual = forward.rows
    unit = grid.gradient_C + grid.precision.gradient_slack - 51
    both = unit + grid.deviation_C
    if grid.precision.folds == 2:
        a = np.ldexp(_floats(two_folds(limbs[0:4], 52)), unit - 52)
        b = np.ldexp(_floats(two_folds(limbs[4:8], 52)), both - 52)
    else:
        a = as_float(*limbs[0:2]) * power_of_two(unit)
        b = as_float(*limbs[2:4]) * power_of_two(both)
    b = b - a * pivot_residual
    slope = s * s * b / divisor
    offset = a / divisor - slope * (residual + mean_share)
    out_of_range, not_finite = counted(limbs[-2])
    nonfinite = forward.nonfinite | not_finite | out_of_range
    dtype = grid.precision.dtype
    rows = np.stack([np.where(nonfinite, np.nan, a), np.where(nonfinite, np.nan, s * b), offset, slope])
    gradients = Gradients(rows, offset.astype(dtype), slope.astype(dtype), nonfinite)
    return gradients, refused_gradients(limbs)


def refused_gradients(limbs: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """The channels that need a new backward grid, (C,) bool; None if none does. A nonfinite one stays so."""
    out_of_range, not_finite = counted(limbs[-2])
    large, some = counted(limbs[-1])
    refused = (out_of_range | (some & ~large)) & ~not_finite
    return refused if refused.any() else None


def _floats(values: list[int]) -> Doubles:
    return np.array([float(value) for value in values], np.float64)
