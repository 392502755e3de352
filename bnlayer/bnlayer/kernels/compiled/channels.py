"""The arithmetic at the end of a step, a channel at a time: a dozen small NumPy calls in one.

Each function computes, operation by operation, what the method it names does in NumPy, where the formulas stand; for
float32 data alone, whose sums have one fold.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.folds import power
from bnlayer.kernels.compiled.jit import inlined, kernel
from bnlayer.precision import SINGLE

Array = NDArray[Any]

_LOW = 0xFFFF_FFFF
_SLACK, _GRADIENT_SLACK = SINGLE.slack, SINGLE.gradient_slack


@inlined
def _as_float(hi: int, lo: int) -> Any:
    """`bnlayer.limbs.as_float`."""
    hi += lo >> 32
    lo &= _LOW
    return np.float64(hi) * 2.0**32 + np.float64(lo)


@inlined
def _exponent_above(a: float, none: int) -> Any:
    """`bnlayer.precision.exponent_above`."""
    return math.frexp(a)[1] if a > 0 else none


@kernel
def statistics(
    limbs: Array, pivot: Array, exponent: Array, epsilon: float, e: float, lowest: int,
    rows: Array, rounded: Array, about: Array, reach: Array, nonfinite: Array, refused: Array,
) -> bool:  # fmt: skip
    """`Moments.statistics` and `Moments.refused`.

    Args:
        limbs: (6, C), reduced.
        pivot, exponent: (C,), the grid.
        epsilon: the layer's.
        e: 1e-7 with a mask, else 0.
        lowest: the exponent that says "no range".
        rows: (8, C) float64, receives count, divisor, mean, variance, inverse_std, residual, mean_share,
            pivot_residual.
        rounded, about: (C,) float32, receive rounded_mean and pivot.
        reach: (C,) int64.
        nonfinite, refused: (C,) bool.

    Returns:
        Whether a channel needs a new grid.
    """
    again = False
    for c in range(pivot.size):
        count, flags = limbs[4, c], limbs[5, c]
        out_of_range, not_finite = flags >> 32 > 0, flags & _LOW > 0
        w = exponent[c]
        some = np.float64(max(count, 1))
        n = np.float64(count)
        u2 = power(2 * w - 52)
        a = _as_float(limbs[0, c], limbs[1, c]) * power(w + _SLACK - 51) / some
        spread = max(_as_float(limbs[2, c], limbs[3, c]) * u2 / some - a * a, 0.0)
        unit = max(u2, abs(a) * power(w + _SLACK - 52))
        coarse = w > lowest and count > 0 and spread + epsilon < unit * min(2.0**22, 2.0**42 / some)
        refused[c] = (out_of_range or coarse) and not not_finite
        again |= refused[c]
        divisor = n + e if n + e > 0 else 1.0
        center = pivot[c] + a
        delta = center * (e / divisor)
        mean = center - delta
        variance = (spread + delta * delta) * (n / divisor)
        rounded[c] = np.float32(mean)
        rows[0, c], rows[1, c], rows[2, c], rows[3, c] = n, divisor, mean, variance
        rows[4, c] = 1.0 / math.sqrt(variance + epsilon)
        rows[5, c] = ((pivot[c] - np.float64(rounded[c])) + a) - delta
        rows[6, c] = mean * (e / divisor)
        farthest = math.sqrt(n * (spread + 128.0 * u2))
        from_mean = _exponent_above(farthest + abs(delta) + 2.0**-23 * abs(mean), lowest) + 1
        from_zero = _exponent_above(farthest + abs(a), lowest) + 1
        about_zero = pivot[c] == 0.0
        about[c] = np.float32(0.0) if about_zero else rounded[c]
        rows[7, c] = mean if about_zero else rows[5, c]
        reach[c] = min(w, from_zero) if about_zero else from_mean
        nonfinite[c] = not_finite or out_of_range
    return again


@kernel
def moved(
    mean: Array, variance: Array, count: Array, nonfinite: Array, old_mean: Array, old_variance: Array,
    momentum: float, synchronized: bool, masked: bool, new_mean: Array, new_variance: Array,
) -> None:  # fmt: skip
    """`bnlayer.moving.update` without renorm, for float32 variables."""
    for c in range(mean.size):
        m, v = mean[c], variance[c]
        if nonfinite[c] and not synchronized:
            m = v = np.nan
        to_mean = np.float32(np.float64(old_mean[c]) * momentum + m * (1.0 - momentum))
        to_variance = np.float32(np.float64(old_variance[c]) * momentum + v * (1.0 - momentum))
        apply = count[c] > 0
        if synchronized:
            apply = apply and not nonfinite[c] and np.isfinite(to_mean) and np.isfinite(to_variance)
        else:
            apply = apply or masked
        new_mean[c] = to_mean if apply else old_mean[c]
        new_variance[c] = to_variance if apply else old_variance[c]


@kernel
def coefficients(gamma: Any, beta: Any, inverse_std: Array, residual: Array, scale: Array, shift: Array) -> None:
    """γs and β − residual·γs, for float32 variables; None: there is no γ, or no β."""
    for c in range(inverse_std.size):
        a = (1.0 if gamma is None else np.float64(gamma[c])) * inverse_std[c]
        b = 0.0 if beta is None else np.float64(beta[c])
        scale[c] = np.float32(a)
        shift[c] = np.float32(b - residual[c] * a)


@kernel
def gradients(
    limbs: Array, gradient: Array, deviation: Array, divisor: Array, inverse_std: Array, residual: Array,
    mean_share: Array, pivot_residual: Array, forward_nonfinite: Array, rows: Array, nonfinite: Array, refused: Array,
) -> bool:  # fmt: skip
    """`GradientSums.gradients` and `GradientSums.refused`.

    Args:
        limbs: (6, C), reduced.
        gradient, deviation: (C,), the grid.
        divisor, inverse_std, residual, mean_share, pivot_residual, forward_nonfinite: of the batch's statistics.
        rows: (4, C) float64, receives beta, gamma, offset, slope.
        nonfinite, refused: (C,) bool.

    Returns:
        Whether a channel needs a new grid.
    """
    again = False
    for c in range(gradient.size):
        out_of_range, not_finite = limbs[4, c] >> 32 > 0, limbs[4, c] & _LOW > 0
        large, some = limbs[5, c] >> 32 > 0, limbs[5, c] & _LOW > 0
        refused[c] = (out_of_range or (some and not large)) and not not_finite
        again |= refused[c]
        s = inverse_std[c]
        a = _as_float(limbs[0, c], limbs[1, c]) * power(gradient[c] + _GRADIENT_SLACK - 51)
        b = _as_float(limbs[2, c], limbs[3, c]) * power(gradient[c] + _GRADIENT_SLACK + deviation[c] - 51)
        b = b - a * pivot_residual[c]
        slope = s * s * b / divisor[c]
        offset = a / divisor[c] - slope * (residual[c] + mean_share[c])
        bad = forward_nonfinite[c] or not_finite or out_of_range
        rows[0, c] = np.nan if bad else a
        rows[1, c] = np.nan if bad else s * b
        rows[2, c], rows[3, c] = offset, slope
        nonfinite[c] = bad
    return again
