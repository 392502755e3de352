"""`GradientSums`: the exact Σ dy and Σ dy·(x − p) of a batch, and the coefficients of the input gradient.

Both sums run over ALL positions, masked ones included: a masked output depends on the mean and variance too.

Shape suffixes: C channels, W limbs: per fold A_hi, A_lo; per fold B_hi, B_lo; two limbs of flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid
from bnlayer.kernels.choice import quick_channels
from bnlayer.limbs import as_float, counted, flags
from bnlayer.moments import BatchStatistics, two_folds
from bnlayer.precision import power_of_two


@dataclass(frozen=True, eq=False, slots=True)
class Gradients:
    """What follows from the sums, each (C,) float64, NaN where the channel is nonfinite.

    Attributes:
        beta: dβ = Σ dy.
        gamma: dγ = s·Σ dy·(x − μ).
        offset: c1 of dx = ((dy − c1) − (x − rounded_mean)·slope)·γs.
        slope: k = s²·B/D.
        nonfinite: bool, some value was not finite or lies outside every window.
    """

    beta: NDArray[np.float64]
    gamma: NDArray[np.float64]
    offset: NDArray[np.float64]
    slope: NDArray[np.float64]
    nonfinite: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class GradientSums:
    """Exact sums of one or more shards' output gradients on a grid.

    Attributes:
        limbs: (W, C) int64, packed.
        grid: what the limbs are in units of.
    """

    limbs: NDArray[np.int64]
    grid: BackwardGrid

    @staticmethod
    def rows(folds: int) -> int:
        """W: the number of limbs per channel."""
        return 4 * folds + 2

    @classmethod
    def pack(
        cls,
        grid: BackwardGrid,
        gradients: list[NDArray[np.int64]],
        products: list[NDArray[np.int64]],
        out_of_range_C: NDArray[np.bool_],
        not_finite_C: NDArray[np.bool_],
        large_C: NDArray[np.bool_],
        any_C: NDArray[np.bool_],
    ) -> GradientSums:
        """One shard's sums, [hi, lo] per fold, and what the pass saw: see `refused` for the flags."""
        rows = [*gradients, *products, flags(out_of_range_C, not_finite_C), flags(large_C, any_C)]
        return cls(np.ascontiguousarray(np.stack(rows), np.int64), grid)

    @property
    def out_of_range_C(self) -> NDArray[np.bool_]:
        """Whether some |dy| or |x − p| lies outside its window."""
        return counted(self.limbs[-2])[0]

    @property
    def not_finite_C(self) -> NDArray[np.bool_]:
        """Whether some unmasked dy is NaN or infinite."""
        return counted(self.limbs[-2])[1]

    def check_window(self, statistics: BatchStatistics) -> tuple[Callable[[], Gradients], NDArray[np.bool_] | None]:
        """What gives the `gradients`, and what is `refused`; None if nothing is. See `Moments.judged`."""
        quick = quick_channels()
        if quick is None or self.grid.precision.folds == 2:
            refused = self.refused()
            return partial(self.gradients, statistics), refused if refused.any() else None
        rows, (nonfinite, refused) = np.empty((4, self.limbs.shape[1])), np.empty((2, self.limbs.shape[1]), np.bool_)
        any_refused = quick.gradients(
            self.limbs, self.grid.gradient_C, self.grid.deviation_C, statistics.divisor, statistics.inverse_std,
            statistics.residual, statistics.mean_share, statistics.pivot_residual, statistics.nonfinite,
            rows, nonfinite, refused,
        )  # fmt: skip
        beta, gamma, offset, slope = rows
        computed = Gradients(beta, gamma, offset, slope, nonfinite)
        return lambda: computed, refused if any_refused else None

    def refused(self) -> NDArray[np.bool_]:
        """The channels that need a new grid, (C,) bool.

        A value lies outside its window; or gradients are there, and all lie 2^20-fold below it. A channel of which
        nothing finite comes asks for none: see `of_call`.
        """
        large, any_nonzero = counted(self.limbs[-1])
        return (self.out_of_range_C | (any_nonzero & ~large)) & ~self.not_finite_C

    def of_call(self, nonfinite_C: NDArray[np.bool_]) -> GradientSums:
        """The sums, with the call's nonfinite channels flagged, so that the reduction does not need the call."""
        if not nonfinite_C.any():
            return self
        limbs = self.limbs.copy()
        limbs[-2] |= flags(np.zeros_like(nonfinite_C), nonfinite_C)
        return GradientSums(limbs, self.grid)

    @np.errstate(all="ignore")  # Inf and NaN are answers here, on the owner as on the ranks
    def gradients(self, statistics: BatchStatistics) -> Gradients:
        """The gradients of gamma and beta and the coefficients of the input gradient.

        B' = B − A·(μ − p)        k = s²·B'/D        c1 = A/D − k·(r + μ·e/D)        dγ = s·B'        dβ = A

        Args:
            statistics: of the training call whose outputs the gradients belong to.
        """
        grid, s = self.grid, statistics.inverse_std
        unit = grid.gradient_C + grid.precision.gradient_slack - 51
        both = unit + grid.deviation_C
        if grid.precision.folds == 2:
            a = np.ldexp(_floats(two_folds(self.limbs[0:4], 52)), unit - 52)
            b = np.ldexp(_floats(two_folds(self.limbs[4:8], 52)), both - 52)
        else:
            a = as_float(*self.limbs[0:2]) * power_of_two(unit)
            b = as_float(*self.limbs[2:4]) * power_of_two(both)
        b = b - a * statistics.pivot_residual
        slope = s * s * b / statistics.divisor
        offset = a / statistics.divisor - slope * (statistics.residual + statistics.mean_share)
        nonfinite = statistics.nonfinite | self.not_finite_C | self.out_of_range_C
        return Gradients(
            beta=np.where(nonfinite, np.nan, a),
            gamma=np.where(nonfinite, np.nan, s * b),
            offset=offset,
            slope=slope,
            nonfinite=nonfinite,
        )


def _floats(values: list[int]) -> NDArray[np.float64]:
    return np.array([float(value) for value in values], np.float64)
