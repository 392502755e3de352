"""`Moments`: the exact sum, sum of squares and count of a batch, and the statistics that follow from them.

Adding the limbs of two shards is exact, so neither the number of shards nor their order can be seen in any of
this. Everything below is a pure function of the reduced limbs, evaluated alike by every rank and by the owner.

Shape suffixes: C channels, W limbs of a packed sum: per fold S_hi, S_lo; per fold T_hi, T_lo; count; flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import Grid
from bnlayer.kernels.choice import quick_channels
from bnlayer.limbs import as_float, as_ints, counted, flags
from bnlayer.precision import exponent_above

MASKED_COUNT_EPSILON = 1e-7  # Keras adds it to the sum of a mask (`backend.epsilon()`)


@dataclass(frozen=True, eq=False, slots=True)
class BatchStatistics:
    """The statistics of one global batch, each (C,) float64.

    Attributes:
        count: N, the unmasked values of the channel over all ranks.
        divisor: D = N + e, where e = 1e-7 with a mask and 0 without; 1 where that is 0.
        mean: μ = Σx / D.
        variance: v = Σ(x − μ)² / D, biased.
        inverse_std: 1 / √(v + ε).
        rounded_mean: μ rounded to the data's dtype (held in that dtype): what the passes that write subtract.
        residual: r = μ − rounded_mean, computed without cancellation.
        mean_share: μ·e/D, 0 without a mask.
        pivot: p, what gradients are multiplied about (held in the data's dtype): 0 where float32 data lie about the
            grid's pivot 0, else rounded_mean.
        pivot_residual: μ − p.
        reach: int64, |x − p| < 2^reach for every unmasked x.
        nonfinite: bool, an unmasked value was not finite, or lies outside every window.
    """

    count: NDArray[np.float64]
    divisor: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    inverse_std: NDArray[np.float64]
    rounded_mean: NDArray[np.floating]
    residual: NDArray[np.float64]
    mean_share: NDArray[np.float64]
    pivot: NDArray[np.floating]
    pivot_residual: NDArray[np.float64]
    reach: NDArray[np.int64]
    nonfinite: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Moments:
    """Exact first and second moments of one or more shards on a grid.

    Attributes:
        limbs: (W, C) int64, packed.
        grid: what the limbs are in units of.
    """

    limbs: NDArray[np.int64]
    grid: Grid

    @staticmethod
    def rows(folds: int) -> int:
        """W: the number of limbs per channel."""
        return 4 * folds + 2

    @classmethod
    def pack(
        cls,
        grid: Grid,
        deviations: list[NDArray[np.int64]],
        squares: list[NDArray[np.int64]],
        count_C: NDArray[np.int64],
        out_of_range_C: NDArray[np.bool_],
        not_finite_C: NDArray[np.bool_],
    ) -> Moments:
        """One shard's moments from its sums, [hi, lo] per fold, and what the pass saw."""
        rows = [*deviations, *squares, count_C, flags(out_of_range_C, not_finite_C)]
        return cls(np.ascontiguousarray(np.stack(rows), np.int64), grid)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both: exact, commutative, associative.

        Raises:
            ValueError: the two lie on different grids.
        """
        if self.grid.fingerprint != other.grid.fingerprint:
            raise ValueError("Moments of different grids can't be added: probe again, on all ranks.")
        return Moments(self.limbs + other.limbs, self.grid)

    @property
    def count_C(self) -> NDArray[np.int64]:
        """N: the unmasked values."""
        return np.asarray(self.limbs[-2])

    @property
    def out_of_range_C(self) -> NDArray[np.bool_]:
        """Whether some |x − pivot| lies outside the window."""
        return counted(self.limbs[-1])[0]

    @property
    def not_finite_C(self) -> NDArray[np.bool_]:
        """Whether some unmasked value is NaN or infinite."""
        return counted(self.limbs[-1])[1]

    @cached_property
    def mean_variance(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean deviation from the pivot and the biased variance, each (C,) float64; 0 without a value.

        a = S·u1/N        V = max(T·u2/N − a², 0)
        """
        n = np.maximum(self.count_C, 1)
        if self.grid.precision.folds == 2:
            return self._mean_variance_exact(n)
        a = as_float(*self.limbs[0:2]) * self.grid.unit1_C / n
        second = as_float(*self.limbs[2:4]) * self.grid.unit2_C / n
        return a, np.maximum(second - a * a, 0.0)

    def _mean_variance_exact(self, n: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same for two folds, in integers, rounded once at the end: T·N − S² cancels too much for floats."""
        # The second folds are in units 2^52 (deviations) and 2^51 (squares) finer: both end at exponent − 103.
        s = two_folds(self.limbs[0:4], 52)
        t = two_folds(self.limbs[4:8], 51)
        w, counts = self.grid.exponent_C, n.tolist()
        a = np.array([si / ni for si, ni in zip(s, counts, strict=True)])
        spread = [
            max((ti * ni << 103) - si * si, 0) / (ni * ni << 103) for si, ti, ni in zip(s, t, counts, strict=True)
        ]
        return np.ldexp(a, w - 103), np.ldexp(np.array(spread), 2 * w - 103)

    def exact(self) -> list[tuple[int, Fraction, Fraction]]:
        """N, Σx and Σx² of each channel, without any further rounding; for pooling over grids."""
        folds = self.grid.precision.folds
        if folds == 2:
            sums, squares = two_folds(self.limbs[0:4], 52), two_folds(self.limbs[4:8], 51)
            finer = (103, 103)
        else:
            sums, squares = as_ints(*self.limbs[0:2]), as_ints(*self.limbs[2:4])
            finer = (51 - self.grid.precision.slack, 52)
        pooled = []
        for n, s, q, p, w in zip(
            self.count_C.tolist(), sums, squares, self.grid.pivot_C.tolist(), self.grid.exponent_C.tolist(), strict=True
        ):
            d, dd = s * Fraction(2) ** (w - finer[0]), q * Fraction(2) ** (2 * w - finer[1])
            pivot = Fraction(p)
            pooled.append((n, d + n * pivot, dd + 2 * pivot * d + n * pivot * pivot))
        return pooled

    def check_window(
        self, epsilon: float, masked: bool
    ) -> tuple[Callable[[], BatchStatistics], NDArray[np.bool_] | None]:
        """What gives the `statistics`, and what is `refused`; None if nothing is.

        Where one compiled call finds both they are there at once; otherwise they are computed when asked for: the owner
        answers the ranks before that.
        """
        quick = quick_channels()
        if quick is None or self.grid.precision.folds == 2:
            refused = self.refused(epsilon)
            return partial(self.statistics, epsilon, masked), refused if refused.any() else None
        grid, channels = self.grid, self.limbs.shape[1]
        rows, (rounded, pivot) = np.empty((8, channels)), np.empty((2, channels), np.float32)
        reach, (nonfinite, refused) = np.empty(channels, np.int64), np.empty((2, channels), np.bool_)
        e = MASKED_COUNT_EPSILON if masked else 0.0
        any_refused = quick.statistics(
            self.limbs, grid.pivot_C, grid.exponent_C, epsilon, e, grid.precision.lowest,
            rows, rounded, pivot, reach, nonfinite, refused,
        )  # fmt: skip
        count, divisor, mean, variance, inverse_std, residual, mean_share, pivot_residual = rows
        statistics = BatchStatistics(
            count, divisor, mean, variance, inverse_std, rounded, residual, mean_share, pivot, pivot_residual, reach,
            nonfinite,
        )  # fmt: skip
        return lambda: statistics, refused if any_refused else None

    @np.errstate(all="ignore")  # Inf and NaN are answers here, on the owner as on the ranks
    def refused(self, epsilon: float) -> NDArray[np.bool_]:
        """The channels that need a new grid, (C,) bool.

        A value lies outside the window; or the window has become too coarse for the spread:
        V + ε < max(u2, |a|·u1/2)·min(2^22, 2^42/N). A nonfinite channel asks for none: it stays so on any grid.
        """
        a, variance = self.mean_variance
        n = np.maximum(self.count_C, 1)
        # T is wrong by half a unit a term at most, a by half of u1, which makes a² wrong by |a|·u1: together less than
        # 2^-20 of V + ε. Many terms' roundings average out far below it.
        needed = np.maximum(self.grid.unit2_C, np.abs(a) * self.grid.unit1_C / 2) * np.minimum(2.0**22, 2.0**42 / n)
        ranged = (self.grid.exponent_C > self.grid.precision.lowest) & (self.count_C > 0)
        coarse = (variance + epsilon < needed) & ranged
        return (self.out_of_range_C | coarse) & ~self.not_finite_C

    @np.errstate(all="ignore")
    def statistics(self, epsilon: float, masked: bool) -> BatchStatistics:
        """The batch's statistics, once its moments are accepted.

        δ = (pivot + a)·e/D        μ = pivot + a − δ        v = (V + δ²)·N/D

        Args:
            epsilon: added to the variance before the root.
            masked: whether the call has a mask, so that e = 1e-7.
        """
        grid, precision = self.grid, self.grid.precision
        a, spread = self.mean_variance
        n = self.count_C.astype(np.float64)
        e = MASKED_COUNT_EPSILON if masked else 0.0
        divisor = np.where(n + e > 0, n + e, 1.0)
        center = grid.pivot_C + a
        delta = center * (e / divisor)
        mean = center - delta
        variance = (spread + delta * delta) * (n / divisor)
        rounded = mean.astype(precision.dtype)
        residual = ((grid.pivot_C - rounded.astype(np.float64)) + a) - delta
        farthest = np.sqrt(n * (spread + 128.0 * grid.unit2_C))  # from the mean without e
        from_mean = exponent_above(farthest + np.abs(delta) + precision.epsilon * np.abs(mean), precision.lowest) + 1
        from_zero = exponent_above(farthest + np.abs(a), precision.lowest) + 1
        about_zero = (grid.pivot_C == 0) & (precision.folds == 1)
        return BatchStatistics(
            count=n,
            divisor=divisor,
            mean=mean,
            variance=variance,
            inverse_std=1.0 / np.sqrt(variance + epsilon),
            rounded_mean=rounded,
            residual=residual,
            mean_share=mean * (e / divisor),
            pivot=np.where(about_zero, 0, rounded).astype(precision.dtype),
            pivot_residual=np.where(about_zero, mean, residual),
            reach=np.where(about_zero, np.minimum(grid.exponent_C, from_zero), from_mean),
            nonfinite=self.not_finite_C | self.out_of_range_C,
        )


def two_folds(limbs: NDArray[np.int64], shift: int) -> list[int]:
    """One integer per channel from two folds, the second in units 2^shift finer."""
    coarse, fine = as_ints(*limbs[0:2]), as_ints(*limbs[2:4])
    return [(c << shift) + f for c, f in zip(coarse, fine, strict=True)]
