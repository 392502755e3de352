"""`Moments`: the exact sum, sum of squares and count of a batch, and the statistics that follow from them.

Adding the limbs of two shards is exact, so neither the number of shards nor their order can be seen in any of
this. Everything below is a pure function of the reduced limbs, evaluated alike by every rank and by the owner.

Shape suffixes: C channels, W limbs of a packed sum: per fold S_hi, S_lo; per fold T_hi, T_lo; count; flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import Grid
from bnlayer.kernels import formulas, kernels
from bnlayer.kernels.results import BatchStatistics
from bnlayer.limbs import as_ints, counted, limbs_of_sum, two_folds

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = ["MASKED_COUNT_EPSILON", "BatchStatistics", "Moments"]

MASKED_COUNT_EPSILON = 1e-7  # Keras adds it to the sum of a mask (`backend.epsilon()`)


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
        return limbs_of_sum(folds)

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

    @property
    def mean_variance(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The mean deviation from the pivot and the biased variance, each (C,) float64; 0 without a value."""
        return formulas.mean_variance(self.limbs, self.grid)

    def exact(self) -> list[tuple[int, Fraction, Fraction]]:
        """N, Σx and Σx² of each channel, without any further rounding; for pooling over grids."""
        from fractions import Fraction  # with `decimal` a twentieth of this package's import

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

    def check_window(self, epsilon: float, masked: bool) -> tuple[BatchStatistics, NDArray[np.bool_] | None]:
        """The statistics, and the channels that need a new grid, (C,) bool; None if none does.

        Args:
            epsilon: added to the variance before the root.
            masked: whether the call has a mask, so that e = 1e-7.
        """
        return kernels().statistics(self.limbs, self.grid, epsilon, MASKED_COUNT_EPSILON if masked else 0.0)

    def statistics(self, epsilon: float, masked: bool) -> BatchStatistics:
        """The batch's statistics, once its moments are accepted."""
        return self.check_window(epsilon, masked)[0]
